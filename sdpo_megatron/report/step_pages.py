"""The pages of one step."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import write_atomically
from sdpo_megatron.report.responses import (
    FLAGS,
    Render,
    divergence_of,
    flags_of,
    mean_of,
    response_page,
    token_count,
)
from sdpo_megatron.report.scripts import write_script
from sdpo_megatron.report.token_texts import TokenTexts
from sdpo_megatron.run_dir.records_file import RecordedResponse, read_record

VERSION = 1
"""Of the pages: those of another one are written again."""
SNIPPET = 160
"""Characters of a response that a step's list shows."""
CHUNK_CHARACTERS = 1 << 19
"""A file of texts takes no further group once it holds so much."""


class StepFacts(TypedDict):
    """What done.json says of a step's pages, which is written last."""

    version: int
    source: list[Any]
    """Name, size and time of the files that the pages show."""
    lacks_texts: bool
    """Whether tokens are there whose texts no tokenizer gave."""
    counts: dict[str, int]
    """Responses that have each of FLAGS, and `responses`."""
    groups: list[tuple[str, int]]
    """Each group's problem, and how many responses were right."""
    error: str | None
    """Why the records could not be read."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the pages of all steps have in common."""

    threshold: float
    """The reward from which on a response is right, where its record does not say it."""
    group_size: int | None
    render: Render | None
    texts: TokenTexts | None


def source_of(record: Path) -> list[Any]:
    """Returns what changes when the files of a step are written again; `record` is that of the jsonl."""
    files = [path for path in (record, record.with_suffix(".npz")) if path.is_file()]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def read_facts(folder: Path, record: Path) -> StepFacts | None:
    """Returns what `write_step` left; None where it did not come to its end, was another version's, or the files have
    changed since."""
    try:
        facts: StepFacts = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        is_current = facts["version"] == VERSION and facts["source"] == source_of(record)
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return facts if is_current else None


def write_step(record: Path, out: Path, name: str, task: Task) -> StepFacts:
    """Writes the pages of a step to `out`/`name`. Records that cannot be read make a page that says so."""
    (out / name).mkdir(parents=True, exist_ok=True)
    # before they are read: what is replaced meanwhile is written again the next time
    source = source_of(record)
    try:
        return _written(source, read_record(record), None, out, name, task)
    except UserError as error:
        problem = error.message
    # what another revision's records may hold
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        problem = f"{record} cannot be shown ({type(error).__name__}: {error})."
    return _written(source, [], problem, out, name, task)


def _written(
    source: list[Any],
    responses: list[RecordedResponse],
    problem: str | None,
    out: Path,
    name: str,
    task: Task,
) -> StepFacts:
    groups = list(_groups(responses, task.group_size))
    chunk_of = _write_chunks(out, name, responses, groups, task)
    flags = [flags_of(response, task.threshold) for response in responses]
    step = {
        "error": problem,
        "flagNames": FLAGS,
        "groups": [
            {"problem": responses[start].problem, "prompt": _prompt(responses[start]), "first": start}
            | {"count": end - start, "chunk": chunk}
            for (start, end), chunk in zip(groups, chunk_of, strict=True)
        ],
        "flags": flags,
        "reward": [response.reward for response in responses],
        "tokens": [token_count(response) for response in responses],
        "divergence": [divergence_of(response) for response in responses],
        "advantage": [mean_of(response.advantages_T) for response in responses],
        "snippet": [(response.response or response.thought)[:SNIPPET] for response in responses],
    }
    write_script(out, f"{name}/step", step)
    counts = {flag: sum(bits >> bit & 1 for bits in flags) for bit, flag in enumerate(FLAGS)}
    facts = StepFacts(
        version=VERSION,
        source=source,
        lacks_texts=task.texts is None and counts["per token"] > 0,
        counts=counts | {"responses": len(responses)},
        groups=[(responses[s].problem, sum(bits & 1 for bits in flags[s:e])) for s, e in groups],
        error=problem,
    )
    write_atomically(out / name / "done.json", json.dumps(facts) + "\n", durable=False)
    return facts


def _groups(responses: Sequence[RecordedResponse], size: int | None) -> Iterator[tuple[int, int]]:
    """Yields [start, end) of each group: a problem's responses lie together, and `size` are a group's at most."""
    start = 0
    for n in range(1, len(responses) + 1):
        if n == len(responses) or responses[n].problem != responses[start].problem or n - start == size:
            yield start, n
            start = n


def _prompt(response: RecordedResponse) -> str:
    """The last turn, which is the question, as far as a list shows it."""
    return response.prompt[-1]["content"][:300] if response.prompt else ""


def _write_chunks(
    out: Path,
    name: str,
    responses: Sequence[RecordedResponse],
    groups: Sequence[tuple[int, int]],
    task: Task,
) -> list[int]:
    """Writes the files of texts; returns the number of each group's."""
    chunk_of: list[int] = []
    pages: list[dict[str, Any]] = []
    size, chunk = 0, 0
    for start, end in groups:
        if size >= CHUNK_CHARACTERS:
            write_script(out, f"{name}/{chunk:04d}", pages)
            pages, size, chunk = [], 0, chunk + 1
        shown = [
            response_page(start + g, response, task.render, task.texts)
            for g, response in enumerate(responses[start:end])
        ]
        pages.append(
            {"problem": responses[start].problem, "prompt": responses[start].prompt} | _shared(shown)
        )
        size += sum(map(_size, shown))
        chunk_of.append(chunk)
    if pages:
        write_script(out, f"{name}/{chunk:04d}", pages)
    return chunk_of


def _shared(shown: list[dict[str, Any]]) -> dict[str, Any]:
    """Has each teacher's prompt of a group stand there once."""
    prompts: dict[str, int] = {}
    for page in shown:
        text = page.pop("teacher_prompt")
        page["teacherPrompt"] = None if text is None else prompts.setdefault(text, len(prompts))
    return {"teacherPrompts": list(prompts), "responses": shown}


def _size(page: dict[str, Any]) -> int:
    columns = sum(map(len, page.get("columns", {}).values()))
    texts = 3 * len(page.get("texts", ())) + len(page["response"]) * (2 if "texts" in page else 1)
    return len(page["thought"]) + len(page["feedback"]) + columns + texts
