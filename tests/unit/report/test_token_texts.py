from collections.abc import Sequence
from pathlib import Path

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.report.token_texts import TokenTexts, load_token_texts
from sdpo_megatron.run_dir.snapshots_file import write_snapshots
from tests.tiny_model import make_tokenizer


def test_texts_of_tokens_make_the_whole_text_also_where_characters_take_several():
    tokenizer = make_tokenizer()
    texts = TokenTexts(lambda ids: str(tokenizer.decode(list(ids))), tokenizer.encode("a")[:1])
    said = "def f(x): return '漢字 \U0001f600é'"
    ids = tokenizer.encode(said)
    found = texts.of(ids)
    assert len(found) == len(ids) and "".join(found) == said
    assert "\U0001f600" in found and "" in found


def test_a_space_that_begins_a_token_is_kept_where_a_tokenizer_drops_it_at_the_beginning():
    words = {1: "a", 2: "▁b", 3: "▁c"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    assert TokenTexts(decode, [1]).of([2, 3, 1]) == [" b", " c", "a"]


def test_bytes_that_never_become_a_character_stay_tokens_of_their_own():
    def decode(ids: Sequence[int]) -> str:
        return "a" if ids == [0] else "a" * (0 in ids) + "\ufffd" * (len(ids) - (0 in ids))

    assert TokenTexts(decode, [0]).of([7, 7]) == ["\ufffd", "\ufffd"]


@pytest.mark.parametrize(("revision", "place"), [(None, "of_main"), ("v1", "of_v1")])
def test_the_tokenizer_is_the_models_own_and_no_other_of_the_run(
    tmp_path: Path, revision: str | None, place: str
):
    """A teacher's id may begin as the model's does."""
    names = {"a/b-teacher@main": "teacher", "a/b@main": "of_main", "a/b@v1": "of_v1"}
    for directory in names.values():
        (tmp_path / directory).mkdir()
    write_snapshots(tmp_path / "snapshots.json", {name: str(tmp_path / names[name]) for name in names})
    values = {"model": {"path": "a/b", "revision": revision}}
    with pytest.raises(UserError, match=f"{place} holds no tokenizer"):
        load_token_texts(values, tmp_path / "snapshots.json")
    (tmp_path / place).rmdir()
    with pytest.raises(UserError, match="the model a/b is not on this machine"):
        load_token_texts(values, tmp_path / "snapshots.json")
