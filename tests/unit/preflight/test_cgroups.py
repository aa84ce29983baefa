"""What containers and batch systems let a process have, in files of both versions."""

from pathlib import Path

import pytest

from sdpo_megatron.preflight import cgroups


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "max", "memory.current": "7", "memory.stat": "inactive_file 1"}, None),
        ({"memory.max": "100", "memory.current": "70", "memory.stat": "anon 9\ninactive_file 20"}, 50),
        ({"memory.max": "100", "memory.current": "130", "memory.stat": "anon 130"}, 0),
        (
            {
                "memory.limit_in_bytes": "100",
                "memory.usage_in_bytes": "70",
                "memory.stat": "inactive_file 1\ntotal_inactive_file 5",
            },
            35,
        ),
        ({}, None),
    ],
    ids=["unlimited", "version 2", "above its limit", "version 1", "the root"],
)
def test_what_a_container_has_left(files: dict[str, str], free: int | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert cgroups.memory_left(tmp_path) == free


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "max"}, None),
        ({"memory.max": "4096"}, 4096),
        ({"memory.limit_in_bytes": "4096"}, 4096),
        ({"memory.limit_in_bytes": "9223372036854771712"}, None),
        ({}, None),
    ],
)
def test_a_groups_memory(files: dict[str, str], limit: int | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert cgroups.memory_limit(tmp_path) == limit


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        ({"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"}, 4.0),
        ({}, None),
    ],
)
def test_a_groups_cores(files: dict[str, str], cores: float | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert cgroups.cpu_quota(tmp_path) == cores


def test_a_process_is_limited_by_its_group_and_those_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert all(path.is_dir() for kind in ("memory", "cpu") for path in cgroups.groups(kind))
    own = tmp_path / "own"
    own.write_text("3:memory:/job/step\n2:cpu,cpuacct:/job\n0::/other\n")
    monkeypatch.setattr(cgroups, "OWN_GROUPS", own)
    monkeypatch.setattr(cgroups, "CGROUP", tmp_path / "cgroup")
    for path in ("memory/job/step", "cpu/job"):
        (tmp_path / "cgroup" / path).mkdir(parents=True)
    # the unified hierarchy's `/other` is not shown here: its root is
    root = [tmp_path / "cgroup"]
    assert cgroups.groups("memory") == [
        *(tmp_path / "cgroup" / path for path in ("memory/job/step", "memory/job", "memory")),
        *root,
    ]
    assert cgroups.groups("cpu") == [tmp_path / "cgroup/cpu/job", tmp_path / "cgroup/cpu", *root]
