"""The cluster of tests/slurm: started before the first test that asks for it, as it was after each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, what_is_missing
from tests.slurm.running import as_on_a_login_node
from tests.stand_in_server import stand_in_python
from tests.tiny_model import make_tiny_model

ANOTHER_ENDS_WITHIN_S = 600.0
"""So long is waited for the cluster of another run of the tests."""


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For fixtures of a module; a test takes `cluster`."""
    if missing := what_is_missing():
        pytest.skip(f"a Slurm cluster cannot be started here: {missing}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.up(wait_s=ANOTHER_ENDS_WITHIN_S)
    yield cluster
    cluster.down()


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    """Four idle nodes, and this process as on a login node. After the test its jobs are ended, and nodes that it lost
    are back. Jobs that were there before go on."""
    with as_on_a_login_node(started_cluster):
        if not started_cluster.is_up:  # a test before this one ended it, and failed
            started_cluster.up(wait_s=ANOTHER_ENDS_WITHIN_S)
        before = max(started_cluster.jobs(), default=0)
        yield started_cluster
        started_cluster.restore(keep=before)


@pytest.fixture
def shared_dir(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """A new directory that all nodes and this process see. `tmp_path` is none: a node has its own /tmp."""
    number = len(list(cluster.shared.iterdir()))
    path = cluster.shared / f"{number}-{request.node.name[:40].replace('/', '-')}"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def engines(started_cluster: Cluster) -> tuple[Path, Path]:
    """A model and the interpreter of the stand-in that samples repeatably, where all nodes see them."""
    model = make_tiny_model(started_cluster.shared / "model")
    return model, stand_in_python(started_cluster.shared / "stand_in", "--repeatable", "--slow", "0.05")
