from pathlib import Path

import pytest

from sdpo_megatron.build import build_chat
from sdpo_megatron.config import RolloutSettings
from sdpo_megatron.errors import UserError
from tests.tiny_model import make_tokenizer


def test_a_tokenizer_of_more_tokens_than_the_model(tmp_path: Path):
    make_tokenizer().save_pretrained(tmp_path)
    largest = build_chat(tmp_path, RolloutSettings(), vocab=10**6).largest_id
    assert build_chat(tmp_path, RolloutSettings(), vocab=largest + 1)
    with pytest.raises(UserError) as caught:
        build_chat(tmp_path, RolloutSettings(), vocab=largest)
    assert str(caught.value) == (
        f"The tokenizer in {tmp_path} has token ids up to {largest}, but config.json says vocab_size {largest}: take "
        "the tokenizer that belongs to the model."
    )
