"""The responses of a step under way: what comes back after an interruption, what does not, and what is removed when."""

import dataclasses
import math
import shutil
import threading
from array import array
from pathlib import Path

import pytest

from sdpo_megatron.records import Rollout, WeightSpan
from sdpo_megatron.run_dir import inflight
from sdpo_megatron.run_dir.inflight import InflightResponses

PROMPTS_P = [[1, 2, 3], [4, 5]]
ASKED = {"the policy": "weights of step 3", "what is asked": "these problems"}


def rollout(p: int, g: int) -> Rollout:
    return Rollout(
        prompt_ids=PROMPTS_P[p],
        response_ids_T=array("i", [p, g, 2**31 - 1]),
        rollout_logprobs_T=array("f", [-0.1, -math.inf, -1e-40]),
        loss_mask_T=array("B", [1, 0, 1]),
        weight_spans=[WeightSpan(start=0, end=1, version=2), WeightSpan(start=1, end=3, version=3)],
        finish_reason="thinking",
        text="¡sí! \x1b[2J\n\u2028 𝔸",
        thought='"thought"\r\n',
    )


EMPTY = Rollout(
    prompt_ids=PROMPTS_P[1],
    response_ids_T=array("i"),
    rollout_logprobs_T=array("f"),
    loss_mask_T=array("B"),
    weight_spans=[],
    finish_reason="abort",
    text="",
)
ALL = {(0, 0): rollout(0, 0), (0, 7): rollout(0, 7), (1, 0): EMPTY, (1, 1): rollout(1, 1)}


class Stage:
    """One run directory, and starts of runs in it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "rollouts" / "inflight"
        self.lines: list[str] = []

    def start(self, first_step: int) -> InflightResponses:
        self.lines.clear()
        return InflightResponses(self.root, first_step, self.lines.append)

    def leave(self, step: int, saved: int = 3) -> None:
        """What an attempt leaves that is interrupted in the rollout of `step`."""
        kept = self.start(saved)
        kept.begin(step, ASKED, PROMPTS_P)
        for place, response in ALL.items():
            kept.keep(place, response)
        kept.settle()

    @property
    def file(self) -> Path:
        return self.root / "000003" / "responses.jsonl"

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.root.iterdir()) if self.root.exists() else []


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_everything_of_a_response_comes_back_to_the_last_bit(stage: Stage):
    stage.leave(3)
    found = stage.start(3).begin(3, ASKED, PROMPTS_P)
    assert found == ALL and stage.lines == []
    for place, response in found.items():
        for name in ("response_ids_T", "rollout_logprobs_T", "loss_mask_T"):
            back, there = getattr(response, name), getattr(ALL[place], name)
            # equal numbers may have other bits
            assert (back.typecode, back.tobytes()) == (there.typecode, there.tobytes())


def test_a_line_that_is_cut_anywhere_costs_its_own_response_alone(stage: Stage):
    stage.leave(3)
    whole = stage.file.read_bytes()
    ends = [end for end, byte in enumerate(whole) if byte == ord("\n")]
    last_whole, last_begin = ends[-3], ends[-2] + 1
    assert whole[last_whole + 1 : last_begin] == b"\n"
    for cut in range(last_begin, len(whole) - 1, 7):
        stage.file.write_bytes(whole[:cut])
        kept = stage.start(3)
        assert kept.begin(3, ASKED, PROMPTS_P) == {
            place: response for place, response in ALL.items() if place != (1, 1)
        }
        # what comes behind half a line is a line of its own
        kept.keep((1, 1), ALL[1, 1])
        kept.settle()
        assert stage.start(3).begin(3, ASKED, PROMPTS_P) == ALL


def test_a_changed_byte_costs_its_own_response_alone(stage: Stage):
    stage.leave(3)
    whole = bytearray(stage.file.read_bytes())
    for place in range(0, len(whole), 11):
        if whole[place] == ord("\n"):
            continue
        changed = whole.copy()
        changed[place] ^= 1
        stage.file.write_bytes(changed)
        found = stage.start(3).begin(3, ASKED, PROMPTS_P)
        assert len(found) == 3 and found.items() <= ALL.items()


@pytest.mark.parametrize(
    "other, said",
    [
        ({"the policy": "weights of another step 3"}, "the policy is not the same now"),
        ({"what is asked": "other problems"}, "what is asked is not the same now"),
        (
            {"the policy": "others", "what is asked": "others"},
            "the policy and what is asked are not the same now",
        ),
    ],
)
def test_what_was_sampled_for_something_else_is_removed_and_said_once(stage: Stage, other, said):
    stage.leave(3)
    kept = stage.start(3)
    assert kept.begin(3, ASKED | other, PROMPTS_P) == {}
    assert stage.lines == [f"step 3's responses of before the interruption (4) are not used: {said}."]
    kept.keep((0, 0), ALL[0, 0])
    kept.settle()
    # what was there before does not come back behind the new one
    assert stage.start(3).begin(3, ASKED | other, PROMPTS_P) == {(0, 0): ALL[0, 0]}
    assert stage.start(3).begin(3, ASKED, PROMPTS_P) == {}


def test_without_responses_there_is_nothing_to_say(stage: Stage):
    stage.start(3).begin(3, ASKED, PROMPTS_P)
    assert stage.start(3).begin(3, ASKED | {"the policy": "others"}, PROMPTS_P) == {} and stage.lines == []


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{", b"\xff"])
def test_responses_of_which_nobody_knows_what_was_asked_are_removed(stage: Stage, content):
    stage.leave(3)
    asked = stage.root / "000003" / "asked.json"
    asked.unlink() if content is None else asked.write_bytes(content)
    assert stage.start(3).begin(3, ASKED, PROMPTS_P) == {}
    assert "(4) are not used" in stage.lines[0]


def test_another_version_of_the_file_is_not_read(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    stage.leave(3)
    monkeypatch.setattr(inflight, "VERSION", 2)
    assert stage.start(3).begin(3, ASKED, PROMPTS_P) == {}
    assert "version is not the same now" in stage.lines[0]


def test_a_start_removes_what_is_of_other_steps(stage: Stage):
    stage.leave(3)
    stage.leave(5)
    assert stage.steps == [3, 5]
    stage.start(3)
    assert stage.steps == [3]
    assert stage.lines == [
        "step 5's responses of before the interruption (4) are not used: the run goes on from step 3."
    ]
    # those of steps that are saved have done their work
    stage.start(4)
    assert stage.steps == [] and stage.lines == []


def test_a_step_that_was_trained_to_anew_finds_nothing_of_the_first_time(stage: Stage):
    """Steps 3 and 4 are made and lost, and made again: what step 5 had was sampled from weights that are no more."""
    stage.leave(5)
    kept = stage.start(3)
    kept.begin(3, ASKED, PROMPTS_P)
    kept.begin(4, ASKED, PROMPTS_P)
    assert kept.begin(5, ASKED, PROMPTS_P) == {}


def test_what_a_restart_would_use_stays_until_a_checkpoint_has_it_behind_it(stage: Stage):
    kept = stage.start(3)
    for step in (3, 4, 5):
        kept.begin(step, ASKED, PROMPTS_P)
    # those of 4 were of no more use once 5 began: a crash leads back to 3, a stop saves 5
    assert stage.steps == [3, 5]
    kept.saved(5)
    assert stage.steps == [5]
    kept.begin(6, ASKED, PROMPTS_P)
    assert stage.steps == [5, 6]
    kept.saved(7)
    assert not stage.root.exists()


def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device", "/there")


def test_a_full_disk_is_one_warning_and_training_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    kept = stage.start(3)
    kept.begin(3, ASKED, PROMPTS_P)
    monkeypatch.setattr(inflight.os, "fsync", full_disk)
    for place in [(0, 0), (0, 7)]:
        kept.keep(place, ALL[place])
        kept.settle()
    monkeypatch.setattr(inflight, "write_atomically", full_disk)
    before = stage.file.read_bytes()
    assert kept.begin(4, ASKED, PROMPTS_P) == {}
    kept.keep((0, 0), ALL[0, 0])
    assert kept.begin(5, ASKED, PROMPTS_P) == {}
    # nothing of one step gets among another's
    assert stage.file.read_bytes() == before
    ending = "; training goes on, and after an interruption the step's responses are sampled anew."
    assert stage.lines == [
        f"warning: writing {stage.file} failed (OSError: [Errno 28] No space left on device: '/there'){ending}",
        f"warning: keeping /there failed (No space left on device){ending}",
    ]
    monkeypatch.undo()
    kept.begin(6, ASKED, PROMPTS_P)
    kept.keep((0, 0), ALL[0, 0])
    kept.settle()
    assert stage.start(6).begin(6, ASKED, PROMPTS_P) == {(0, 0): ALL[0, 0]}


def test_what_cannot_be_removed_is_never_taken_for_this_runs(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    stage.leave(3)
    before = stage.file.read_bytes()
    kept = stage.start(3)
    monkeypatch.setattr(shutil, "rmtree", full_disk)
    assert kept.begin(3, ASKED | {"the policy": "others"}, PROMPTS_P) == {}
    kept.keep((0, 0), ALL[0, 0])
    kept.settle()
    assert stage.file.read_bytes() == before
    assert [line.startswith("warning: ") for line in stage.lines] == [False, True]


def test_the_thread_that_brings_a_response_neither_waits_nor_warns(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
):
    written, warned_by = threading.Event(), []
    kept = InflightResponses(stage.root, 3, lambda line: warned_by.append((threading.current_thread(), line)))
    kept.begin(3, ASKED, PROMPTS_P)

    def slow_then_full(descriptor: int) -> None:
        written.wait(10)
        full_disk()

    monkeypatch.setattr(inflight.os, "fsync", slow_then_full)

    def bring() -> None:
        for place, response in ALL.items():
            kept.keep(place, response)

    bringing = threading.Thread(target=bring)
    bringing.start()
    bringing.join(10)
    # the disk has taken nothing by now
    assert not bringing.is_alive() and not written.is_set() and warned_by == []
    written.set()
    # a failure is there to be told, and is not told by who brings another
    kept._writer.wait()
    last = threading.Thread(target=kept.keep, args=((0, 0), dataclasses.replace(EMPTY)))
    last.start()
    last.join(10)
    assert warned_by == []
    kept.settle()
    assert [thread for thread, _ in warned_by] == [threading.current_thread()]
