"""Makes `demo_steps.json.gz`, the samples of the demo's first two steps, from what a run of it has left:

    .venv/bin/python -m sdpo_megatron.train yaml/demo_cpu.yaml run.name=recorded run.steps=2
    .venv/bin/python -m tests.replay.recording runs/recorded

`rollouts/train` holds every field of a `Sample` but `id`, the response's number. Numbers are written as the run wrote
them, nothing is rounded. Another recording has other samples: the
server's answers depend on the processor and on how requests fall together. `expected.json` must then be made anew.

The file is one JSON object: `prompts`, a list of lists of token ids, and `steps`, for each of them its samples, whose
`prompt_ids` and `teacher_prompt_ids` are indices into `prompts`.
"""

import argparse
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from sdpo_megatron.records import Sample
from sdpo_megatron.run_dir.records_file import RecordedResponse, read_record

RECORDED = Path(__file__).with_name("demo_steps.json.gz")
STEPS = 2
PROMPTS = ("prompt_ids", "teacher_prompt_ids")


def read_run(directory: Path) -> list[list[Sample]]:
    """The samples of the first steps of the run in `directory`."""
    names = [field.name for field in dataclasses.fields(Sample) if field.name != "id"]

    def sample(number: int, response: RecordedResponse) -> Sample:
        values = {name: getattr(response, name) for name in names}
        plain = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}
        return Sample(id=number, **plain)

    paths = [directory / "rollouts" / "train" / f"{step:06d}.jsonl" for step in range(STEPS)]
    return [[sample(*numbered) for numbered in enumerate(read_record(path))] for path in paths]


def write(steps: list[list[Sample]], path: Path = RECORDED) -> None:
    """The same bytes for the same samples."""
    prompts: list[list[int]] = []

    def index(ids: list[int] | None) -> int | None:
        if ids is None:
            return None
        if ids not in prompts:
            prompts.append(ids)
        return prompts.index(ids)

    def row(sample: Sample) -> dict[str, Any]:
        return dataclasses.asdict(sample) | {name: index(getattr(sample, name)) for name in PROMPTS}

    rows = [[row(sample) for sample in samples] for samples in steps]
    text = json.dumps({"prompts": prompts, "steps": rows}, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read(path: Path = RECORDED) -> list[list[Sample]]:
    """The samples of each step, as `write` was given them."""
    recorded = json.loads(gzip.decompress(path.read_bytes()))

    def sample(row: dict[str, Any]) -> Sample:
        ids: dict[str, Any] = {}
        for name in PROMPTS:
            ids[name] = None if row[name] is None else recorded["prompts"][row[name]]
        return Sample(**(row | ids))

    return [[sample(row) for row in rows] for rows in recorded["steps"]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.replay.recording")
    parser.add_argument("directory", type=Path, help="of a run")
    steps = read_run(parser.parse_args().directory)
    write(steps)
    assert read() == steps
    print(f"{RECORDED}: {[len(samples) for samples in steps]} samples, {RECORDED.stat().st_size} bytes")


if __name__ == "__main__":
    main()
