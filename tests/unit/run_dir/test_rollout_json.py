import json
from pathlib import Path

import numpy as np
import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.run_dir.records_file import RecordedResponse, read_record
from sdpo_megatron.run_dir.rollout_json import write_json
from tests.synthetic_run import synthetic_run

TEXTS = [["a <b> \u2028 \ud800", "bc"], ["def", "g"]]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    synthetic_run(
        tmp_path / "x", lambda step: TEXTS, steps=1, feedback="\ud800", encode=lambda text: [1, 2, 3]
    )
    return tmp_path / "x/rollouts/train/000000.jsonl"


def test_it_holds_what_the_record_holds(record: Path):
    write_json(record)
    content = json.loads(record.with_suffix(".json").read_bytes())
    assert (content["step"], content["split"]) == (0, "train")
    responses = read_record(record)
    assert [of["response"] for of in content["responses"]] == ["a <b> \u2028 \ud800", "bc", "def", "g"]
    for of, response in zip(content["responses"], responses, strict=True):
        assert of.keys() == RecordedResponse.__dataclass_fields__.keys()
        for name, value in of.items():
            here = getattr(response, name)
            if isinstance(here, np.ndarray):
                assert np.array_equal(np.array(value, here.dtype), here, equal_nan=True), name
            elif name != "weight_spans":
                assert value == here
    assert content["responses"][1]["weight_spans"] == [{"start": 0, "end": 3, "version": 0}]
    assert content["responses"][2]["response_ids_T"] is None


def test_what_was_not_computed_is_null(record: Path, monkeypatch: pytest.MonkeyPatch):
    import sdpo_megatron.run_dir.rollout_json as module

    responses = read_record(record)
    responses[0].advantages_T[1] = np.nan  # type: ignore[index]
    monkeypatch.setattr(module, "read_record", lambda path: responses)
    write_json(record)
    content = json.loads(record.with_suffix(".json").read_bytes())
    assert content["responses"][0]["advantages_T"][1] is None


def test_of_a_damaged_record_there_is_none(record: Path):
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(UserError):
        write_json(record)
    assert not record.with_suffix(".json").exists()
