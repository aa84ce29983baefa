"""The demo's first steps, replayed without a server: the plain numbers of learning are those that were stored.

Four problems of each of the two recorded steps, as `replaying.py` does it. Here a tolerance leaves room for other
processors and libraries, whose sums differ in their last bits; that no bit has changed between two checkouts on one
machine is seen by `replaying.py --json` in both, whose docstring has the commands. A change that is meant to change
numbers stores new ones:

    .venv/bin/python -m tests.replay.test_replay
"""

import json
from pathlib import Path

import pytest

from tests.replay import recording
from tests.replay.replaying import replay

pytestmark = pytest.mark.distributed

EXPECTED = Path(__file__).with_name("expected.json")
"""By variant, for each step, what a run's row says about learning."""
PROBLEMS = 4
VARIANTS = {"reverse_kl": ["loss.group_advantage_weight=0"], "grpo": ["loss.name=grpo"]}
RELATIVE, ABSOLUTE = 2e-4, 1e-7
"""Measured between this processor's AVX-512 and none of its vector instructions: at most 8e-5 relative, of a loss near
0, else 3e-5."""


def numbers(name: str) -> list[dict[str, float]]:
    """Of each step; without `rollout_gap`, which where server and trainer agree is what their rounding leaves."""
    steps = replay(VARIANTS[name], PROBLEMS)["steps"]
    return [
        {key: value for key, value in step["numbers"].items() if not key.startswith("rollout_gap/")}
        for step in steps
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_replayed_steps_have_the_stored_numbers(name: str) -> None:
    replayed, expected = numbers(name), json.loads(EXPECTED.read_text())[name]
    assert len(replayed) == len(expected) == recording.STEPS
    for step in range(recording.STEPS):
        assert replayed[step] == pytest.approx(expected[step], rel=RELATIVE, abs=ABSOLUTE), f"step {step}"


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    steps = recording.read()
    recording.write(steps, tmp_path / "again.json.gz")
    assert recording.read(tmp_path / "again.json.gz") == steps


if __name__ == "__main__":
    EXPECTED.write_text(json.dumps({name: numbers(name) for name in VARIANTS}, indent=1) + "\n")
