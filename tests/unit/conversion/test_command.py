"""The command line of conversions."""

import pytest

from sdpo_megatron.conversion.command import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required"),
        (["there", "a", "b"], "invalid choice: 'there'"),
        (["hf-to-megatron", "a"], "DST"),
        (["hf-to-megatron", "a", "b", "--tp", "0"], "0 is no number of ranks; give 1 or more"),
        (["hf-to-megatron", "a", "b", "--weights", "teacher"], "unrecognized arguments: --weights teacher"),
        (["megatron-to-hf", "a", "b", "--weights", "student"], "invalid choice: 'student'"),
        (["megatron-to-hf", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["megatron-to-hf", "a", "b", "--tp", "2"], "unrecognized arguments: --tp 2"),
    ],
)
def test_what_it_does_not_understand(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
