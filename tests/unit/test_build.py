import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdpo_megatron.build import build_log
from sdpo_megatron.chat import build_chat
from sdpo_megatron.config import Config, RolloutSettings
from sdpo_megatron.errors import UserError
from sdpo_megatron.run_dir.directory import open_run
from sdpo_megatron.run_dir.phases import PhaseFile
from tests.tiny_model import make_tokenizer


@pytest.mark.parametrize(("solution", "warns"), [("shortest", True), ("random", False)])
def test_the_log_begins_with_what_the_settings_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], solution: str, warns: bool
):
    config = Config.model_validate(
        {
            "run": {"name": "x", "steps": 1},
            "model": {"path": "x"},
            "task": {"env": "equations"},
            "reprompt": {"solution": solution},
        }
    )
    directory = open_run(tmp_path / "x", {}, {})
    rank_0: Any = SimpleNamespace(rank=0, is_main=True, everywhere=lambda work: work())
    build_log(config, directory, rank_0, PhaseFile(directory.phase(0), 0, 0), 0).close()
    directory.close()
    shown = capsys.readouterr()
    assert (
        "warning: reprompt.solution=shortest is known to collapse training" in shown.out + shown.err
    ) == warns


def test_the_log_makes_the_report_of_its_run(tmp_path: Path):
    config = Config.model_validate(
        {
            "run": {"name": "x", "steps": 1},
            "model": {"path": str(tmp_path)},
            "task": {"env": "equations"},
            "log": {"report_every": 1},
        }
    )
    directory = open_run(tmp_path / "x", config.model_dump(), {})
    rank_0: Any = SimpleNamespace(rank=0, is_main=True, everywhere=lambda work: work())
    log = build_log(config, directory, rank_0, PhaseFile(directory.phase(0), 0, 0), 0)
    with log.step(0):
        log.add({"loss": 1.0})
    log.finish()
    log.close()
    directory.close()
    assert json.loads((directory.report / "report.json").read_text())["columns"]["loss"] == [1.0]
    assert (directory.report / "index.html").is_file()


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
