"""A step's responses on disk, their one writer and their one reader.

    rollouts/SPLIT/000012.jsonl    a line per response: text, grade, and what is known once of it
    rollouts/train/000012.npz      compressed columns: what is known per token, of the first groups only

The columns lie end to end, response after response; `offsets` says where each begins. A prompt stands there once,
however many responses have it (-1: none). The npz is written first and the jsonl last, each in one step: a jsonl
without what it names is never there.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import opened_atomically, write_atomically
from sdpo_megatron.records import Grade, Group, Message, Problem, Rollout, Sample, Ungraded, WeightSpan

VERSION = 3
MODEL_COLUMNS = ("old_logprobs", "student_logprobs", "teacher_logprobs", "advantages", "divergence")
"""What the models said, float32; meaningless where `computed` is 0."""
_OTHER_COLUMNS = {"response_ids": np.int32, "rollout_logprobs": np.float32, "loss_mask": np.uint8}
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise of a file that is not whole."""
_COMPRESSION = 1
"""zlib's fastest level: the slower ones take three times as long for 3% less, because most of it is mantissas."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A step's responses as references, of which the writer makes files. Nothing of it may change afterwards."""

    groups_P: Sequence[Group]
    samples: Sequence[Sample] = ()
    """All responses of the groups, in their order; none where nothing was learned from them."""
    recorded: int = 0
    """The first so many samples are recorded per token."""
    columns: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    """Flat over the response tokens of the recorded samples: `computed` (0 where nothing was computed) and those of
    MODEL_COLUMNS that there are. Without `old_logprobs` these are the student's."""
    decode: Callable[[Sequence[int]], str] = str
    """The text of a prompt's ids; called by the writer's thread."""


@dataclass(frozen=True, kw_only=True)
class RecordedResponse:
    """One response as its step left it. None is what was not recorded: from `success` on where nothing was learned
    from the response, from `prompt_ids` on where its group was not recorded per token."""

    problem: str
    prompt: list[Message]
    answer: str
    """The problem's own, that the grader compares with; empty where it has other means."""
    thought: str
    response: str
    reward: float | None
    """None where it could not be graded."""
    feedback: str
    metrics: dict[str, float]
    """The environment's own numbers."""
    ungraded: str | None
    """Why it could not be graded."""
    finish_reason: str
    weight_spans: list[WeightSpan]
    success: bool | None
    group_advantage: float | None
    demonstration_id: int | None
    """The number of the response that the teacher was shown; None also where it was shown none."""
    teacher_tokens: int | None
    hints_lost: bool | None
    """Whether the teacher was told less than was to be said, because its prompt had no room."""
    teacher_prompt: str | None
    """What the teacher read; None also where it would have known nothing that the student does not."""
    prompt_ids: NDArray[np.int32] | None = None
    teacher_prompt_ids: NDArray[np.int32] | None = None
    response_ids_T: NDArray[np.int32] | None = None
    loss_mask_T: NDArray[np.uint8] | None = None
    rollout_logprobs_T: NDArray[np.float32] | None = None
    # the models' numbers are NaN at tokens that were not computed, and None where none was
    old_logprobs_T: NDArray[np.float32] | None = None
    student_logprobs_T: NDArray[np.float32] | None = None
    teacher_logprobs_T: NDArray[np.float32] | None = None
    """Of the first `teacher_tokens` tokens."""
    advantages_T: NDArray[np.float32] | None = None
    divergence_T: NDArray[np.float32] | None = None


def write_record(path: Path, record: StepRecord) -> None:
    """Writes the files of a step; `path` is that of the jsonl. Files of an earlier try are replaced; without responses
    there are none."""
    columns_path = path.with_suffix(".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the columns are not this one's
    path.unlink(missing_ok=True)
    if record.recorded:
        columns = _columns(record.samples[: record.recorded], record.columns)
        with (
            opened_atomically(columns_path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION) as archive,
        ):
            for name, column in columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, column, allow_pickle=False)
    else:
        columns_path.unlink(missing_ok=True)
    digest = _digest(columns_path.read_bytes()) if record.recorded else None
    lines = [f"{json.dumps(line, ensure_ascii=False)}\n" for line in _lines(record, digest)]
    if lines:
        # half of a surrogate pair, which a task's text may hold, has no UTF-8; backslashreplace writes JSON's escape
        write_atomically(path, "".join(lines).encode(errors="backslashreplace").decode())


def read_record(path: Path) -> list[RecordedResponse]:
    """Returns the responses of a step, in their order; `path` is that of the jsonl. What they have per token are views
    of whole columns.

    Raises UserError where a file is missing, of another version, or damaged."""
    if path.suffix != ".jsonl":
        raise UserError(
            f"{path} is not the .jsonl file of a step; name that, the columns beside it are found."
        )
    lines = _read_lines(path)
    digests = {line["columns_digest"] for line in lines if line["columns_row"] is not None}
    columns = _read_columns(path.with_suffix(".npz"), digests) if digests else None
    texts = {}
    responses = []
    with _whole(path):
        for line in lines:
            if line["teacher_prompt"] is not None:
                texts[line["teacher_prompt_line"]] = line["teacher_prompt"]
            facts = {name: line[name] for name in _FACTS}
            facts["weight_spans"] = [WeightSpan(**span) for span in line["weight_spans"]]
            source = line["teacher_prompt_line"]
            facts["teacher_prompt"] = None if source is None else texts[source]
            row, tokens = line["columns_row"], line["teacher_tokens"]
            per_token = {} if row is None or columns is None else _row(columns, row, tokens)
            responses.append(RecordedResponse(**facts, **per_token))
    return responses


_FACTS = tuple(
    field.name for field in dataclasses.fields(RecordedResponse) if field.default is dataclasses.MISSING
)
_LINE_KEYS = {"version", "lines", *_FACTS, "teacher_prompt_line", "columns_row", "columns_digest"}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _lines(record: StepRecord, digest: str | None) -> Iterator[dict[str, Any]]:
    """Yields what stands in each line. `lines` is their number, which shows where some are lost, and `columns_digest`
    the beginning of the npz's SHA-256: another step's columns would be read in silence."""
    graded = [(group.problem, response) for group in record.groups_P for response in _responses(group)]
    line_of_prompt: dict[bytes, int] = {}
    for number, (problem, (rollout, grade)) in enumerate(graded):
        line = {"version": VERSION, "lines": len(graded)} | _said(problem, rollout, grade)
        sample = record.samples[number] if record.samples else None
        for name in ("success", "group_advantage", "demonstration_id", "teacher_tokens", "hints_lost"):
            line[name] = getattr(sample, name, None)
        prompt, source = None, None
        if sample is not None and number < record.recorded and sample.teacher_prompt_ids is not None:
            source = line_of_prompt.setdefault(_as_bytes(sample.teacher_prompt_ids), number)
            prompt = record.decode(sample.teacher_prompt_ids) if source == number else None
        line |= {"teacher_prompt": prompt, "teacher_prompt_line": source}
        is_recorded = number < record.recorded
        line |= {"columns_row": number if is_recorded else None}
        yield line | {"columns_digest": digest if is_recorded else None}


def _responses(group: Group) -> list[tuple[Rollout, Grade | Ungraded]]:
    """Returns all of a group's responses in their order."""
    responses: dict[int, tuple[Rollout, Grade | Ungraded]] = {
        g: (left.rollout, left) for g, left in group.ungraded.items()
    }
    for g, rollout, grade in zip(group.places_G, group.rollouts_G, group.grades_G, strict=True):
        responses[g] = rollout, grade
    return [responses[g] for g in range(group.size)]


def _said(problem: Problem, rollout: Rollout, grade: Grade | Ungraded) -> dict[str, Any]:
    graded = isinstance(grade, Grade)
    return {
        "problem": problem.id,
        "prompt": problem.messages,
        "answer": problem.answer,
        "thought": rollout.thought,
        "response": rollout.text,
        "reward": grade.reward if graded else None,
        "feedback": grade.feedback if graded else "",
        "metrics": dict(grade.metrics) if graded else {},
        "ungraded": None if graded else grade.cause,
        "finish_reason": rollout.finish_reason,
        "weight_spans": [dataclasses.asdict(span) for span in rollout.weight_spans],
    }


def _columns(samples: Sequence[Sample], models: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    index_of: dict[bytes, int] = {}

    def index(ids: Sequence[int] | None) -> int:
        return -1 if ids is None else index_of.setdefault(_as_bytes(ids), len(index_of))

    prompt_of = [index(sample.prompt_ids) for sample in samples]
    teacher_prompt_of = [index(sample.teacher_prompt_ids) for sample in samples]
    prompts = [np.frombuffer(ids, np.int32) for ids in index_of]
    columns: dict[str, NDArray[Any]] = {
        "version": np.asarray(VERSION),
        "offsets": np.cumsum([0, *(len(sample.response_ids_T) for sample in samples)]),
        "prompt_ids": np.concatenate(prompts),
        "prompt_offsets": np.cumsum([0, *map(len, prompts)]),
        "prompt_of": np.asarray(prompt_of, np.int32),
        "teacher_prompt_of": np.asarray(teacher_prompt_of, np.int32),
        "computed": models["computed"].astype(np.uint8),
    }
    for name, kind in _OTHER_COLUMNS.items():
        columns[name] = np.concatenate([np.asarray(getattr(s, f"{name}_T"), kind) for s in samples])
    for name in MODEL_COLUMNS:
        if name in models:
            columns[name] = models[name].astype(np.float32, copy=False)
    wrong = [
        name
        for name in ("computed", *MODEL_COLUMNS)
        if len(columns.get(name, ())) not in (0, columns["offsets"][-1])
    ]
    if wrong:
        raise ValueError(
            f"{columns['offsets'][-1]} tokens are recorded, but {', '.join(wrong)} has another number"
        )
    return columns


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; name the .jsonl file of a step whose responses were recorded."
        ) from None
    with _whole(path):
        # a cut may go through a character
        lines = [json.loads(line) for line in content.split(b"\n")[:-1] or [content]]
        _check_version(path, lines[0].get("version"))
        if not content.endswith(b"\n") or any(line["lines"] != len(lines) for line in lines):
            raise EOFError
        if any(line.keys() != _LINE_KEYS for line in lines):
            raise KeyError
    return lines


def _read_columns(path: Path, digests: set[str]) -> dict[str, NDArray[Any]]:
    """Returns the columns, of which the lines have one digest; the models' numbers are NaN where nothing was
    computed."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing, which holds what {path.stem}.jsonl beside it has per token; copy it there too."
        )
    with _whole(path):
        content = path.read_bytes()
        # without pickles, which could run anything
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
        _check_version(path, columns["version"].item())
        if digests != {_digest(content)}:
            raise EOFError
        for name in columns.keys() & set(MODEL_COLUMNS):
            columns[name] = np.where(columns["computed"], columns[name], np.float32(np.nan))
    return columns


def _row(columns: Mapping[str, NDArray[Any]], row: int, teacher_tokens: int) -> dict[str, Any]:
    """Returns the views of one response, by the names that RecordedResponse has for them."""
    start, end = columns["offsets"][row : row + 2]
    ids, starts = columns["prompt_ids"], columns["prompt_offsets"]

    def prompt(index: int) -> NDArray[Any] | None:
        return None if index < 0 else ids[starts[index] : starts[index + 1]]

    found: dict[str, Any] = {f"{name}_T": columns[name][start:end] for name in _OTHER_COLUMNS}
    found["prompt_ids"] = prompt(columns["prompt_of"][row])
    found["teacher_prompt_ids"] = prompt(columns["teacher_prompt_of"][row])
    if columns["computed"][start:end].any():
        found |= {f"{name}_T": columns[name][start:end] for name in MODEL_COLUMNS if name in columns}
        found.setdefault("old_logprobs_T", found.get("student_logprobs_T"))
        if found["teacher_prompt_ids"] is None:
            found.pop("teacher_logprobs_T", None)
        elif "teacher_logprobs_T" in found:
            found["teacher_logprobs_T"] = found["teacher_logprobs_T"][:teacher_tokens]
    return found


def _check_version(path: Path, version: Any) -> None:
    if version != VERSION:
        raise UserError(
            f"{path} is of version {version} of a step's records, and this program reads version {VERSION}; read it "
            "with the revision that wrote it, which config.json names."
        )


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Has whatever goes wrong with the content of `path` end in one line."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(
            f"{path} is cut short, damaged or of another step ({type(error).__name__}); copy the step's .jsonl and "
            ".npz again from where they were written. The run goes on without them."
        ) from None
