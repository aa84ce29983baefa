"""What is known of a published set: where it lies, which fields mean what, and what is held out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdpo_megatron.envs.data.lines import Line

Split = Literal["train", "test"]
Patterns = Mapping[str, tuple[str, ...]]
"""Part of a set -> its files in the origin, by glob. A part is `train` or `test`, or `all` where rows are told apart
here."""


@dataclass(frozen=True)
class Origin:
    """Where a publisher keeps the files."""

    kind: Literal["hub", "github"]
    name: str
    """owner/name: a data set of the Hugging Face Hub, or a repository on GitHub."""
    revision: str = "main"
    """Branch, tag or commit; a commit where it is known."""

    def url(self, path: str) -> str:
        """Returns the address of one file of a repository on GitHub."""
        return f"https://raw.githubusercontent.com/{self.name}/{self.revision}/{path}"

    def command(self, patterns: Patterns) -> str:
        """Returns the shell command that fetches these files into ./DIR where there is a connection."""
        files = [pattern for part in patterns.values() for pattern in part]
        if self.kind == "github":
            return "curl --create-dirs --location " + " ".join(
                f"--output DIR/{path} {self.url(path)}" for path in files
            )
        wanted = " ".join(f"--include '{pattern}'" for pattern in files)
        return (
            f"hf download {self.name} --repo-type dataset --revision {self.revision} {wanted} --local-dir DIR"
        )


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A set by name. Its rows become rows that `env` reads."""

    what: str
    env: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """`task.options` that the rows need."""
    origin: Origin | None = None
    """None for somebody's own files."""
    files: Patterns
    licence: str = "not known"
    row: Callable[[Line], dict[str, Any]] | None = None
    """The environment's row, with domain and difficulty where the set has them; None where the row is one."""
    split: str
    """The rule, in words."""
    part_of: Callable[[Line], Split | None] | None = None
    """Which part a row of `all` belongs to; None leaves it out. Without it every row is kept, and a seeded share held
    out."""
    variants: tuple[str, ...] = ()
    """Ways to split that a user may choose among; the first is the default. `paper` writes one file, which the
    environment splits."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """How many rows a part has as published, where it is known."""
    note: str = ""
    """What a user has to know: overlaps, gates."""
