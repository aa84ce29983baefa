import json
import os
import pickle
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Grade, Group, Problem, Rollout, Sample, Ungraded, WeightSpan
from sdpo_megatron.run_dir import records_file
from sdpo_megatron.run_dir.records_file import MODEL_COLUMNS, StepRecord, read_record, write_record

TOKENS = [2, 3, 1, 4]
"""Of two groups of two responses."""
NAN = float("nan")


def sample(number: int, teacher_prompt: list[int] | None, teacher_tokens: int) -> Sample:
    count = TOKENS[number]
    return Sample(
        id=number,
        prompt_ids=[number // 2, 70000],
        response_ids_T=[100 * number + t for t in range(count)],
        rollout_logprobs_T=[-0.1 * (t + 1) for t in range(count)],
        loss_mask_T=[1] * (count - 1) + [0],
        teacher_prompt_ids=teacher_prompt,
        teacher_tokens=teacher_tokens,
        success=number == 0,
        group_advantage=0.5 - number,
        demonstration_id=None if teacher_prompt is None else 0,
    )


SAMPLES = [sample(0, None, 0), sample(1, [8, 9], 2), sample(2, [8, 9], 1), sample(3, [7], 4)]


def group(p: int) -> Group:
    rollouts_G = [
        Rollout(
            prompt_ids=list(s.prompt_ids),
            response_ids_T=list(s.response_ids_T),
            rollout_logprobs_T=list(s.rollout_logprobs_T),
            loss_mask_T=list(s.loss_mask_T),
            weight_spans=[WeightSpan(start=0, end=TOKENS[s.id], version=5)],
            finish_reason="stop",
            text=f"é{s.id}\n",
            thought="hm",
        )
        for s in SAMPLES[2 * p : 2 * p + 2]
    ]
    grades_G = [Grade(reward=1.0), Grade(reward=0.0, feedback="no")]
    problem = Problem(id=f"p{p}", messages=[{"role": "user", "content": f"{p}?"}])
    return Group(problem=problem, rollouts_G=rollouts_G, grades_G=grades_G)


def record(recorded: int = 4, names: tuple[str, ...] = MODEL_COLUMNS) -> StepRecord:
    tokens = sum(TOKENS[:recorded])
    computed = np.ones(tokens, np.float32)
    computed[:2] = 0  # nothing of the first response, and not the last token of the second
    computed[4:5] = 0
    columns = {name: (np.arange(tokens) + 10 * k).astype(np.float32) for k, name in enumerate(names)}
    return StepRecord(
        groups_P=[group(0), group(1)],
        samples=SAMPLES,
        recorded=recorded,
        columns=columns | {"computed": computed},
        decode=lambda ids: f"text of {list(ids)}",
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "000012.jsonl"


def test_everything_comes_back(path: Path):
    write_record(path, record())
    responses = read_record(path)
    for number, (response, of) in enumerate(zip(responses, SAMPLES, strict=True)):
        p, g = divmod(number, 2)
        rollout, grade = group(p).rollouts_G[g], group(p).grades_G[g]
        said = (response.problem, response.prompt, response.thought, response.response, response.weight_spans)
        assert said == (f"p{p}", group(p).problem.messages, "hm", rollout.text, rollout.weight_spans)
        assert (response.reward, response.feedback, response.finish_reason) == (
            grade.reward,
            grade.feedback,
            "stop",
        )
        for name, value in asdict(of).items():
            found: Any = value if name == "id" else getattr(response, name)
            if isinstance(found, np.ndarray):
                np.testing.assert_array_equal(found, np.asarray(value, found.dtype))
            else:
                assert found == value, name
    prompts = [None, "text of [8, 9]", "text of [8, 9]", "text of [7]"]
    assert [response.teacher_prompt for response in responses] == prompts
    kinds = [np.asarray(getattr(responses[0], name)).dtype for name in ("response_ids_T", "loss_mask_T")]
    assert kinds == [np.int32, np.uint8]


def test_what_was_not_computed_is_told_from_0(path: Path):
    write_record(path, record())
    first, second, third, fourth = read_record(path)
    assert all(getattr(first, f"{name}_T") is None for name in MODEL_COLUMNS)
    np.testing.assert_array_equal(second.old_logprobs_T, [2, 3, NAN])
    np.testing.assert_array_equal(second.student_logprobs_T, [12, 13, NAN])
    # the teacher's context ended there
    np.testing.assert_array_equal(second.teacher_logprobs_T, [22, 23])
    np.testing.assert_array_equal(third.advantages_T, [35])
    np.testing.assert_array_equal(fourth.divergence_T, [46, 47, 48, 49])
    untaught = replace(record(), samples=[*SAMPLES[:3], replace(SAMPLES[3], teacher_prompt_ids=None)])
    write_record(path, untaught)
    assert read_record(path)[3].teacher_logprobs_T is None


def test_one_optimizer_step_has_its_old_logprobs_from_the_student(path: Path):
    write_record(path, record(names=("student_logprobs", "advantages")))
    response = read_record(path)[1]
    np.testing.assert_array_equal(response.old_logprobs_T, [2, 3, NAN])
    np.testing.assert_array_equal(response.student_logprobs_T, [2, 3, NAN])
    assert response.teacher_logprobs_T is None and response.divergence_T is None


def test_groups_behind_the_recorded_ones_have_their_text_alone(path: Path):
    write_record(path, record(recorded=2))
    responses = read_record(path)
    assert [response.response_ids_T is None for response in responses] == [False, False, True, True]
    assert responses[3].response == "é3\n" and responses[3].group_advantage == -2.5
    # its text would be the ids once more
    assert [response.teacher_prompt for response in responses] == [None, "text of [8, 9]", None, None]
    assert responses[3].prompt_ids is None and responses[3].teacher_logprobs_T is None
    write_record(path, record(recorded=0))
    assert [response.response_ids_T for response in read_record(path)] == [None] * 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_evaluation_was_not_learned_from(path: Path):
    write_record(path, StepRecord(groups_P=[group(0)]))
    responses = read_record(path)
    assert [response.reward for response in responses] == [1.0, 0.0]
    assert {(r.success, r.group_advantage, r.teacher_tokens, r.teacher_prompt) for r in responses} == {
        (None,) * 4
    }


def test_no_responses_leave_no_file(path: Path):
    write_record(path, record())
    write_record(path, StepRecord(groups_P=[]))
    assert list(path.parent.iterdir()) == []


def test_each_prompt_stands_there_once(path: Path):
    write_record(path, record())
    text = path.read_text(encoding="utf-8")
    assert text.count("text of [8, 9]") == 1 and text.count("text of [7]") == 1
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as columns:
        assert columns["prompt_ids"].tolist() == [0, 70000, 1, 70000, 8, 9, 7]
        assert columns["prompt_of"].tolist() == [0, 0, 1, 1]


def test_the_lines_come_last_and_never_beside_other_columns(path: Path, monkeypatch: pytest.MonkeyPatch):
    write_record(path, record(recorded=2))
    replaced: list[str] = []

    def killed(temporary: str, target: Path) -> None:
        replaced.append(target.name)
        assert not path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_record(path, record())
    assert replaced == ["000012.npz"]
    assert [file.name for file in path.parent.iterdir()] == ["000012.npz"]


def test_a_column_of_another_length_is_a_bug(path: Path):
    wrong = record()
    with pytest.raises(ValueError, match="10 tokens are recorded, but advantages has another number"):
        write_record(path, replace(wrong, columns={**wrong.columns, "advantages": np.zeros(3, np.float32)}))
    assert list(path.parent.iterdir()) == []


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_record(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_a_file_that_is_cut_anywhere_is_damaged(path: Path):
    write_record(path, record())
    for file in (path, path.with_suffix(".npz")):
        whole = file.read_bytes()
        line_ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
        for length in {0, 1, len(whole) // 3, len(whole) - 1, *line_ends[:3]} - {len(whole)}:
            file.write_bytes(whole[:length])
            assert refused(path).startswith(f"{file.name} is cut short, damaged or of another step ("), length
        file.write_bytes(whole)
    assert len(read_record(path)) == 4


def test_columns_with_other_bytes_or_pickles_are_damaged(path: Path):
    write_record(path, record())
    file = path.with_suffix(".npz")
    whole = file.read_bytes()
    place = whole.index(b"student_logprobs.npy") + 60
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    assert refused(path).startswith("000012.npz is cut short, damaged or of another step (")
    file.write_bytes(pickle.dumps({"version": 1}))
    assert refused(path).startswith("000012.npz is cut short, damaged or of another step (")
    np.savez(file, version=np.asarray([object()], object))
    assert refused(path).startswith("000012.npz is cut short, damaged or of another step (ValueError")
    with zipfile.ZipFile(file, "w"):
        pass
    assert refused(path).startswith("000012.npz is cut short, damaged or of another step (KeyError")


def test_columns_of_another_step_are_damaged(path: Path):
    write_record(path, record())
    lines = path.read_bytes()
    write_record(path, record(recorded=2))
    path.write_bytes(lines)
    assert refused(path).startswith("000012.npz is cut short, damaged or of another step (")


def test_another_version(path: Path, monkeypatch: pytest.MonkeyPatch):
    told = (
        "{} is of version {} of a step's records, and this program reads version 3; read it with the revision that "
        "wrote it, which config.json names."
    )
    path.write_text('{"problem": "p0", "response": "4"}\n')
    assert refused(path) == told.format("000012.jsonl", None)
    monkeypatch.setattr(records_file, "VERSION", 4)
    write_record(path, record())
    monkeypatch.undo()
    assert refused(path) == told.format("000012.jsonl", 4)
    path.write_text(path.read_text().replace('"version": 4', '"version": 3'))
    assert refused(path) == told.format("000012.npz", 4)


def test_a_missing_file(path: Path):
    assert refused(path) == (
        "000012.jsonl does not exist; name the .jsonl file of a step whose responses were recorded."
    )
    write_record(path, record())
    path.with_suffix(".npz").unlink()
    assert refused(path) == (
        "000012.npz is missing, which holds what 000012.jsonl beside it has per token; copy it there too."
    )
    assert json.loads(path.read_text().splitlines()[0])["response"] == "é0\n"


def test_a_record_of_everything_takes_at_most_28_bytes_a_token(path: Path):
    """Drawn numbers are as hard to compress as those of models, and drawn ids harder than text."""
    dice, count = np.random.default_rng(0), 2000
    ids = dice.integers(0, 50_000, count).tolist()
    drawn = replace(SAMPLES[3], response_ids_T=ids, loss_mask_T=[1] * count, teacher_tokens=count)
    drawn = replace(drawn, rollout_logprobs_T=(-dice.exponential(1, count)).tolist())
    rollout = replace(group(0).rollouts_G[0], text="word" * count)
    one = Group(problem=group(0).problem, rollouts_G=[rollout], grades_G=[Grade(reward=1.0)])
    names = MODEL_COLUMNS[1:]
    columns = {name: -dice.exponential(1, count).astype(np.float32) for name in names}
    columns["computed"] = np.ones(count, np.float32)
    write_record(path, StepRecord(groups_P=[one], samples=[drawn], recorded=1, columns=columns))
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    # four of them are the text; without compression it would be 30
    assert size <= 28 * count, size / count


def test_what_could_not_be_graded_keeps_its_place_and_its_cause(path: Path):
    whole = group(0)
    (first, second), grade = whole.rollouts_G, Grade(reward=1.0, metrics={"tests": 0.5})
    left = {0: Ungraded(rollout=first, cause="no sandbox")}
    partly = Group(problem=whole.problem, rollouts_G=[second], grades_G=[grade], ungraded=left)
    write_record(path, StepRecord(groups_P=[partly]))
    responses = read_record(path)
    assert [response.response for response in responses] == [first.text, second.text]
    assert [response.reward for response in responses] == [None, 1.0]
    assert [response.ungraded for response in responses] == ["no sandbox", None]
    assert [response.metrics for response in responses] == [{}, {"tests": 0.5}]
