"""Why an attempt failed, from what its parts have left in their logs."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from sdpo_megatron.cluster.steps import TRAINER
from sdpo_megatron.errors import EXIT_FAILED, EXIT_USER_ERROR
from sdpo_megatron.launch.verdict import RESUMES

SIGNS = {"error: ": EXIT_USER_ERROR, "stopped: ": EXIT_FAILED}
"""How ranks begin to say why they end, and what they exit with then."""
NO_REASON = ("another rank ended", "another attempt than", "asked to")
"""What ranks say that lost another one, or were told to end."""
OF_SRUN = re.compile(
    r"srun: error: (\S+): tasks? [\d,-]+: ((?!Terminated|Exited)[A-Z].*?)\s*(?:\(core dumped\))?$",
    re.MULTILINE,
)
LOST_NODE = re.compile(r"srun: error: .*?[Nn]ode failure on (\S+)")


@dataclass(frozen=True)
class Reason:
    text: str
    exit_code: int = EXIT_FAILED


def reason_in(logs: Path) -> Reason | None:
    """Returns in one line why the trainer ended: what a rank says of itself, else the exception that ended one, else
    the signal that killed one, else the node that was lost; None where nothing tells. srun's exit code is the largest
    of all tasks, those included that it ends because one failed. What differs from attempt to attempt is left out."""
    texts = [text_of(path) for path in sorted(logs.glob("rank*.log"), key=_rank)]
    srun = text_of(logs / f"srun_{TRAINER}.log")
    killed = [Reason(f"a rank on {node} ended: {what}") for node, what in OF_SRUN.findall(srun)]
    lost = [Reason(f"node {node} failed") for node in LOST_NODE.findall(srun)]
    said = [*filter(None, map(_said, texts)), *filter(None, map(_raised, texts)), *killed, *lost]
    return replace(said[0], text=_lasting(said[0].text, logs)) if said else None


def server_reason(logs: Path, name: str, exit_code: int) -> str:
    """Returns why a server's step ended, without what differs from attempt to attempt."""
    said = _said(text_of(logs / f"{name}.out"))
    if said is None:
        return f"{name} ended with exit code {exit_code}"
    return f"{name}: {_lasting(said.text, logs).removesuffix(':')}"


def _lasting(text: str, logs: Path) -> str:
    """Returns `text` without addresses of servers and the attempt's directory."""
    return re.sub(r" at https?://[^ ;,]+", "", text).replace(f"{logs}/", "")


def log_of(logs: Path, reason: str) -> Path:
    """Returns the log that says `reason`, that of rank 0 where none does."""
    if server := re.match(r"server\d+", reason):
        return logs / f"{server[0]}.out"
    paths = [*sorted(logs.glob("rank*.log"), key=_rank), *sorted(logs.glob("server*"))]
    return next(
        (path for path in paths if reason and reason in _lasting(text_of(path), logs)), logs / "rank0.log"
    )


def _rank(path: Path) -> int:
    return int(re.sub(r"\D", "", path.name) or 0)


def text_of(path: Path) -> str:
    """Returns the text of a log, empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _said(text: str) -> Reason | None:
    for line in text.splitlines():
        for sign, code in SIGNS.items():
            if line.startswith(sign) and not any(words in line for words in NO_REASON):
                return Reason(line.removeprefix(sign).replace(RESUMES, "").strip(), code)
    return None


def _raised(text: str) -> Reason | None:
    """Returns the last line of the last traceback."""
    _, found, behind = text.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in behind.splitlines() if line and not line.startswith((" ", "\t"))]
    return Reason(lines[0].strip()) if found and lines else None
