"""The two environments: this interpreter's, which trains, and the server's."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdpo_megatron.cluster.setup import CACHES
from sdpo_megatron.config import ServerSettings
from sdpo_megatron.doctor.asking import Answer, ask
from sdpo_megatron.doctor.findings import Finding, failure, ok

TRAINER, SERVER = "trainer environment", "server environment"
ASK_PYTHON = Path(__file__).with_name("ask_python.py")
SGLANG_ON_CPU = Path(__file__).parents[1] / "launch/sglang_on_cpu.py"
"""The server's program on a CPU, which is run and not imported: only there can SGLang be imported without a GPU."""
TRAINS = ("torch=torch", "megatron-core=megatron.core", "triton=triton", "transformers=transformers")
SERVES = ("sglang", "torch=torch", "triton", "transformers")
"""SGLang itself is imported by its own program."""
OF_THE_TRAINER = ("PYTHONPATH", "PYTHONHOME")
"""What the launcher does not hand to a server."""
CACHE_VARIABLES = (*CACHES, "XDG_CACHE_HOME")


@dataclass
class Interpreter:
    """What one said of itself."""

    python: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    """None where a package is not there."""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        named = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return f"Python {self.python}, {named}" if named else f"Python {self.python}"


def trainer_environment(limit_s: float) -> list[Finding]:
    python = sys.executable
    said = interpreter(_ask([python, str(ASK_PYTHON), *TRAINS], limit_s, os.environ), TRAINS, limit_s)
    todo = f"install into it what setup.py names: {python} -m pip install -e ."
    return [_finding(TRAINER, python, said, todo)]


def server_environment(
    server: ServerSettings, device: Literal["cpu", "cuda"], limit_s: float
) -> list[Finding]:
    """Asks `server.python` for its versions, and whether the server's program comes as far as its own --help."""
    if server.urls:
        return [ok(SERVER, "server.urls names servers that run already: none is started here")]
    todo = "make it (make .venv-sglang), or give the path of another as server.python"
    python = shutil.which(os.path.expanduser(server.python))
    if python is None:
        return [failure(SERVER, f"server.python: there is no program {server.python}", todo)]
    environment = {key: value for key, value in os.environ.items() if key not in OF_THE_TRAINER}
    end = time.monotonic() + limit_s
    try:
        said = interpreter(_ask([python, str(ASK_PYTHON), *SERVES], limit_s, environment), SERVES, limit_s)
    except OSError as error:
        return [failure(SERVER, f"{python} cannot be run: {error.strerror}", todo)]
    if not said.wrong:
        program = [str(SGLANG_ON_CPU)] if device == "cpu" else ["-m", "sglang.launch_server"]
        environment |= {"SGLANG_USE_CPU_ENGINE": "1"} if device == "cpu" else {}
        # it imports all of SGLang before
        answer = _ask([python, *program, "--help"], end - time.monotonic(), environment)
        if answer.exit_code is None:
            said.wrong.append(f"SGLang's program has not shown its --help within {limit_s:.3g} s")
        elif answer.exit_code:
            why = answer.last_error or "no message"
            said.wrong.append(f"SGLang's program ends with code {answer.exit_code}: {why}")
    return [_finding(SERVER, python, said, todo)]


def interpreter(answer: Answer, asked: Sequence[str], limit_s: float) -> Interpreter:
    """Reads what ask_python.py said, as far as it came."""
    said, begun = Interpreter(), ""
    for line in answer.output.splitlines():
        # the last one may be cut
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        said.python = entry.get("python", said.python)
        begun = entry.get("begins", "")
        if "version" in entry:
            said.versions[entry["package"]] = entry["version"]
            if entry["version"] is None:
                said.wrong.append(f"{entry['package']} is not installed")
        # what is not installed need not be told twice
        elif "error" in entry and said.versions[entry["package"]] is not None:
            said.wrong.append(f"{entry['package']} cannot be imported ({entry['error']})")
    what = f"the import of {begun}" if begun else "it"
    if answer.exit_code is None:
        said.wrong.append(f"{what} does not end within {limit_s:.3g} s")
    elif answer.exit_code or len(said.versions) < len(asked):
        said.wrong.append(f"{what} ends with code {answer.exit_code}: {answer.last_error or 'no message'}")
    return said


def _ask(command: Sequence[str], limit_s: float, environment: Mapping[str, str]) -> Answer:
    """Asks where what libraries write on being imported goes with the answer."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as own:
        moved = {"TMPDIR": own, **{variable: own for variable in CACHE_VARIABLES}}
        return ask(command, limit_s, {**environment, **moved})


def _finding(name: str, python: str, said: Interpreter, todo: str) -> Finding:
    figures: dict[str, float | str] = {key: value for key, value in said.versions.items() if value}
    figures["python"] = said.python
    if said.wrong:
        return failure(name, f"{python}: {'; '.join(said.wrong)}", todo, **figures)
    return ok(name, f"{python}: {said}", **figures)
