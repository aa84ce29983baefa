"""Fixtures that several suites share."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# Triton decides when a kernel is defined whether it will be compiled or interpreted: it has to be told before anything
# imports it. Without a GPU's driver, tests run the kernels in the interpreter.
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ["TRITON_INTERPRET"] = "1"

# whoever started the tests by nohup, or in the background of a script, has these ignored, and so would all that they
# start
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-times", type=int, default=1, help="so many times the cases of tests/fuzz")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With `--dist loadfile` all files of tests/slurm go to one worker: there is one cluster on a machine."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder, slash, _ = nodeid.partition("tests/slurm/")
            return folder + slash if slash else super()._split_scope(nodeid)

    return OneCluster(config, log)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny checkpoint, once per kind and session: `tiny_model("qwen3", tie_embeddings=False,
    seed=1)`."""
    made: dict[tuple[str, bool, int], Path] = {}

    def make(family: str = "llama", *, tie_embeddings: bool = True, seed: int = 0) -> Path:
        from tests.tiny_model import make_tiny_model  # imports transformers, which most tests do without

        kind = (family, tie_embeddings, seed)
        if kind not in made:
            directory = tmp_path_factory.mktemp(f"tiny-{family}-{seed}") / "model"
            made[kind] = make_tiny_model(directory, family, tie_embeddings=tie_embeddings, seed=seed)  # type: ignore[arg-type]
        return made[kind]

    return make


@pytest.fixture(scope="module")
def a_server() -> Iterator[Callable[[Path, str], str]]:
    """Gives the URL of a stand-in that somebody else started, with a model and a type; one of each a module."""
    from sdpo_megatron.launch.processes import wait_until
    from sdpo_megatron.launch.server import free_port
    from sdpo_megatron.rollout.client import Client

    running: dict[tuple[Path, str], str] = {}
    with ExitStack() as stack:

        def url(model: Path, dtype: str) -> str:
            if (model, dtype) not in running:
                port = free_port("127.0.0.1")
                flags = ["--model-path", str(model), "--port", str(port), "--dtype", dtype]
                process = subprocess.Popen([sys.executable, "tests/stand_in_server.py", *flags])
                stack.callback(process.wait)
                stack.callback(process.kill)
                client = Client(f"http://127.0.0.1:{port}")
                assert wait_until(client.healthy, 120.0)
                running[model, dtype] = client.url
            return running[model, dtype]

        yield url
