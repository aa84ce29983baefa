"""A configuration that the launcher accepts, with a model of three files and fakes for ranks and server."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.shape import read_model_shape
from tests.byte_tokenizer import write_tokenizer
from tests.sparse_weights import write_weights

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
DRIVER = (
    "import json, sys; from sdpo_megatron.launch.launcher import launch; "
    "sys.exit(launch(*json.loads(sys.argv[1])))"
)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1026,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
}
Value = TypeVar("Value")


def write_model(directory: Path, **changes: object) -> Path:
    """What is checked of a model before it loads: its weights have a header alone, none if `changes` are wrong."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODEL | changes))
    with contextlib.suppress(ConfigError):
        write_weights(directory, read_model_shape(directory))
    write_tokenizer(directory)
    return directory


@dataclass(frozen=True)
class Project:
    """A directory with a YAML file, a model, and runs/x."""

    path: Path
    launchers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def yaml(self) -> Path:
        return self.path / "x.yaml"

    @property
    def run(self) -> Path:
        return self.path / "runs" / "x"

    def rank_command(self, *behaviours: str) -> list[str]:
        """Rank 0 does the first, rank 1 the second, ..."""
        named = {str(rank): behaviour for rank, behaviour in enumerate(behaviours)}
        return [sys.executable, str(HERE / "fake_rank.py"), json.dumps(named), str(self.run)]

    def arguments(self, *behaviours: str, overrides: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
        """For launch.launch."""
        argv = [str(self.yaml), f"parallel.dp={len(behaviours)}", *overrides]
        return argv, self.rank_command(*behaviours)

    def popen(
        self, *behaviours: str, overrides: tuple[str, ...] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """The launcher as a process."""
        arguments = json.dumps(self.arguments(*behaviours, overrides=overrides))
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        self.launchers.append(process)
        return process

    def note(self, rank: int) -> str | None:
        path = self.run / f"note{rank}"
        return path.read_text() if path.exists() else None

    def facts(self, rank: int) -> dict:
        return json.loads((self.run / f"rank{rank}.json").read_text())

    def server(self) -> dict:
        return json.loads((self.run / "servers" / "0.json").read_text())


def make_project(path: Path) -> Project:
    write_model(path / "model")
    python = path / "python"
    python.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(HERE / "fake_sglang.py"))} "$@"\n'
    )
    python.chmod(0o755)
    project = Project(path)
    project.yaml.write_text(
        json.dumps(
            {
                "run": {"name": "x", "dir": str(path / "runs"), "steps": 3, "device": "cpu"},
                "model": {"path": str(path / "model"), "dtype": "float32", "max_context_length": 256},
                "task": {"env": "equations"},
                "rollout": {"problems_per_step": 12, "max_tokens": 16},
                "server": {"python": str(python), "start_timeout_s": 30},
            }
        )
    )
    return project


def until(condition: Callable[[], Value | None], timeout_s: float = 30) -> Value:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)
    return value


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
