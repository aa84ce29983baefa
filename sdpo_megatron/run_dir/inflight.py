"""The responses of a step that is under way, on disk: a run that goes on with that step need not sample them again.

    rollouts/inflight/000012/asked.json        what was asked of which weights
    rollouts/inflight/000012/responses.jsonl   a line for each response that is there: a checksum, and its JSON

A line is appended as soon as its response is there, in a thread. Each begins on a new line, whatever a crash or a full
disk left before it: one that was cut short costs its own response alone. A step's files stay until a checkpoint has
that step behind it.
"""

import contextlib
import hashlib
import json
import os
import queue
import shutil
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sdpo_megatron.files import write_atomically
from sdpo_megatron.records import FinishReason, Rollout, WeightSpan
from sdpo_megatron.run_dir.background_writer import BackgroundWriter

VERSION = 1
ASKED, RESPONSES = "asked.json", "responses.jsonl"

Place = tuple[int, int]
"""Which problem of the step, and which of the responses to it."""


class _Response(msgspec.Struct):
    """A response as a line has it: all but its prompt, of which `asked` is an equal. Arrays are bytes, int32, float32
    and uint8, which JSON has in base64."""

    p: int
    g: int
    ids: bytes
    logprobs: bytes
    loss_mask: bytes
    weight_spans: list[tuple[int, int, int]]
    finish_reason: FinishReason
    text: str
    thought: str


_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(_Response)


class InflightResponses:
    """Keeps the responses of the step under way, and gives those that an interruption left. What the disk does never
    stops training: it becomes one warning for as long as nothing succeeds."""

    def __init__(self, root: Path, first_step: int, message: Callable[[str], None]) -> None:
        """`root` is rollouts/inflight. The run goes on with `first_step`: what is there of other steps is removed,
        because their weights come anew. `message` shows a line."""
        self._root, self._message = root, message
        self._saved = first_step
        """The step that a run would go on with now."""
        self._file: Path | None = None
        """Where responses are kept; None where they cannot be."""
        self._arrived: queue.SimpleQueue[tuple[Place, Rollout]] = queue.SimpleQueue()
        self._writer = BackgroundWriter(self._warn)
        self._failing = False
        with self._whatever_the_disk_does("removing"):
            for step, path in self._others({first_step}):
                if step > first_step:
                    self._say_why_not(step, path, f"the run goes on from step {first_step}")
                shutil.rmtree(path)

    def begin(
        self, step: int, asked: Mapping[str, Any], prompts_P: Sequence[Sequence[int]]
    ) -> dict[Place, Rollout]:
        """Returns the responses of `step` that are there, where they are to what is asked now; else removes them. What
        `keep` is given from now on belongs to this step.

        `asked`, of plain JSON, is all that decides what responses may be, weights included; `prompts_P` are the
        prompts' ids, of which it has a digest."""
        self.settle()
        self._file = None
        found: dict[Place, Rollout] = {}
        now = {"version": VERSION, **asked}
        with self._whatever_the_disk_does("keeping"):
            for _, path in self._others({self._saved, step}):
                shutil.rmtree(path)
            folder = self._root / f"{step:06d}"
            if folder.exists():
                others = _differing(folder / ASKED, now)
                if not others:
                    found = _read(folder / RESPONSES, prompts_P)
                else:
                    what = f"{' and '.join(others)} {'is' if len(others) == 1 else 'are'} not the same now"
                    self._say_why_not(step, folder, what)
                    # before anything is written that would make them look like this run's
                    shutil.rmtree(folder)
            if not folder.exists():
                folder.mkdir(parents=True)
                write_atomically(folder / ASKED, json.dumps(now) + "\n")
            self._file = folder / RESPONSES
        return found

    def keep(self, place: Place, rollout: Rollout) -> None:
        """Has a response of the step written soon. Never blocks, and says nothing: it may be called in any thread."""
        if self._file is not None:
            self._arrived.put((place, rollout))
            self._writer.offer(f"writing {self._file}", self._write_arrived, quietly=True)

    def settle(self) -> None:
        """Waits until all that was given to `keep` is on the disk, or has failed."""
        self._writer.settle()

    def saved(self, step: int) -> None:
        """Is told that a checkpoint has all steps before `step` behind it: what was kept of those has done its work."""
        self._saved = step
        with self._whatever_the_disk_does("removing"):
            for _, path in self._others({step}):
                shutil.rmtree(path)
            with contextlib.suppress(FileNotFoundError):
                if not os.listdir(self._root):
                    self._root.rmdir()

    def _others(self, steps: Collection[int]) -> Iterator[tuple[int, Path]]:
        """Yields what is there of other steps than these."""
        for path in sorted(self._root.iterdir()) if self._root.is_dir() else ():
            if path.name.isdecimal() and int(path.name) not in steps:
                yield int(path.name), path

    def _say_why_not(self, step: int, folder: Path, why: str) -> None:
        if count := _count(folder / RESPONSES):
            self._message(
                f"step {step}'s responses of before the interruption ({count}) are not used: {why}."
            )

    def _write_arrived(self) -> None:
        """Runs in the writer's thread."""
        lines = bytearray()
        with contextlib.suppress(queue.Empty):
            while True:
                lines += _line(*self._arrived.get_nowait())
        if lines and self._file is not None:
            with open(self._file, "ab") as file:
                file.write(lines)
                file.flush()
                # the machine may die as well
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _whatever_the_disk_does(self, doing: str) -> Iterator[None]:
        try:
            yield
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._warn(f"{doing} {error.filename or self._root} failed ({error.strerror})")
            self._failing = True

    def _warn(self, failure: str) -> None:
        self._message(
            f"warning: {failure}; training goes on, and after an interruption the step's responses are sampled anew."
        )


def _line(place: Place, rollout: Rollout) -> bytes:
    content = _ENCODER.encode(
        _Response(
            p=place[0],
            g=place[1],
            ids=array("i", rollout.response_ids_T).tobytes(),
            logprobs=array("f", rollout.rollout_logprobs_T).tobytes(),
            loss_mask=array("B", rollout.loss_mask_T).tobytes(),
            weight_spans=[(span.start, span.end, span.version) for span in rollout.weight_spans],
            finish_reason=rollout.finish_reason,
            text=rollout.text,
            thought=rollout.thought,
        )
    )
    return b"\n%s %s\n" % (_checksum(content), content)


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode()


def _read(path: Path, prompts_P: Sequence[Sequence[int]]) -> dict[Place, Rollout]:
    """Returns the responses whose lines are whole."""
    found: dict[Place, Rollout] = {}
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            checksum, _, content = line.rstrip(b"\n").partition(b" ")
            if checksum != _checksum(content):
                continue
            response = _DECODER.decode(content)
            # of two attempts that wrote at once, both had it from these weights
            found.setdefault((response.p, response.g), _rollout(response, prompts_P[response.p]))
    return found


def _rollout(response: _Response, prompt_ids: Sequence[int]) -> Rollout:
    return Rollout(
        prompt_ids=prompt_ids,
        response_ids_T=array("i", response.ids),
        rollout_logprobs_T=array("f", response.logprobs),
        loss_mask_T=array("B", response.loss_mask),
        weight_spans=[
            WeightSpan(start=start, end=end, version=version) for start, end, version in response.weight_spans
        ],
        finish_reason=response.finish_reason,
        text=response.text,
        thought=response.thought,
    )


def _count(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return sum(bool(line.strip()) for line in file)
    return 0


def _differing(path: Path, now: Mapping[str, Any]) -> list[str]:
    """Returns what of the file `path` is another now; all where it is none of ours."""
    try:
        then = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        then = {}
    before = then if isinstance(then, dict) else {}
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]
