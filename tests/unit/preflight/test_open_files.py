import resource

import pytest

from sdpo_megatron.config import RolloutSettings
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.preflight.open_files import allow_open_files


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The process's limits; the last one holds."""
    known = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: known[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: known.append(limit))
    return known


def test_the_limit_is_raised_as_far_as_it_goes(limits):
    allow_open_files(RolloutSettings())
    assert limits[-1] == (4096, 4096)
    allow_open_files(RolloutSettings())
    assert len(limits) == 2
    limits.append((1024, resource.RLIM_INFINITY))
    allow_open_files(RolloutSettings())
    assert limits[-1] == (65_536, resource.RLIM_INFINITY)


def test_too_low_a_limit_is_said_before_anything_starts(limits):
    with pytest.raises(ConfigError) as caught:
        allow_open_files(RolloutSettings(max_concurrent_requests=5000))
    assert str(caught.value) == (
        "rollout.max_concurrent_requests is 5000, which takes 5256 open files, but this system allows 4096; raise that "
        "limit (ulimit -Hn), or set rollout.max_concurrent_requests to at most 3840."
    )
    assert len(limits) == 1
