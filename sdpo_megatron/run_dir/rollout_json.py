"""A step's responses as one JSON file, for other people's tools: what records_file.py reads, and nothing else.

rollouts/SPLIT/000012.json    {"step", "split", "responses": [...]}, a response by the names of RecordedResponse
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from sdpo_megatron.files import opened_atomically
from sdpo_megatron.run_dir.records_file import RecordedResponse, read_record


def json_beside(record: Path) -> Path:
    """Returns the path of the JSON file of a step; `record` is that of the jsonl."""
    return record.with_suffix(".json")


def write_json(record: Path) -> None:
    """Writes the JSON file of a step whose record is `record`. Raises UserError where that is damaged."""
    responses = read_record(record)
    with opened_atomically(json_beside(record)) as file:
        head = {"step": int(record.stem), "split": record.parent.name}
        file.write(json.dumps(head)[:-1].encode() + b', "responses": [')
        # one at a time: lists take several times the memory of their arrays
        for number, response in enumerate(responses):
            file.write(b",\n" if number else b"\n")
            file.write(json.dumps(_plain(response), allow_nan=False).encode())
        file.write(b"\n]}\n")


def _plain(response: RecordedResponse) -> dict[str, Any]:
    values = {name: value for name, value in vars(response).items() if name != "weight_spans"}
    numbers = {name: _list(value) for name, value in values.items() if isinstance(value, np.ndarray)}
    return values | numbers | {"weight_spans": [dataclasses.asdict(span) for span in response.weight_spans]}


def _list(numbers: np.ndarray) -> list[Any]:
    """NaN, which says that nothing was computed, is null in JSON."""
    if numbers.dtype.kind != "f":
        return numbers.tolist()
    # nine digits are all of a float32; as a double it would have seventeen
    return [float(f"{number:.9g}") if np.isfinite(number) else None for number in numbers.tolist()]
