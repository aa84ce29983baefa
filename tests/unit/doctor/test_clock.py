import time

import pytest

from sdpo_megatron.doctor import clock as module
from sdpo_megatron.doctor.clock import clock


def test_this_machines():
    before = time.time()
    (finding,) = clock()
    assert finding.status == "ok" and time.strftime("%Z") in finding.found
    assert before < float(finding.figures["wall_time"]) < time.time()


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch):
    """A wall clock that shows these times, one after another; the other one counts a quarter of a second."""

    def show(*times: float) -> None:
        shown, counted = iter(times), iter((10.0, 10.25))
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(module.time, "time", lambda: next(shown))
        monkeypatch.setattr(module.time, "monotonic", lambda: next(counted))

    return show


@pytest.mark.parametrize("year", [1970, 2024, 2100])
def test_a_year_that_cannot_be(year, wall):
    then = time.mktime((year, 6, 1, 12, 0, 0, 0, 0, 0))
    wall(then, then + 0.25)
    (finding,) = clock()
    assert finding.status == "failure" and finding.found.startswith(f"{year}-06-01 12:00:00")
    assert "chrony" in finding.todo


@pytest.mark.parametrize("passed", [-3600.0, 0.1, 0.5])
def test_one_that_jumps(passed, wall):
    now = time.time()
    wall(now, now + passed)
    (finding,) = clock()
    assert finding.status == "failure" and f"it moved by {passed:.3f} s in 0.250 s" in finding.found
