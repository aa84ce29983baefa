"""Which problems were there before, on disk: memory does not grow with their number."""

import hashlib
import sqlite3
import unicodedata
from pathlib import Path
from typing import Any, Literal

from sdpo_megatron.data.check import Checked

_EXAMPLES = 5
_BYTES = 16
"""Of a fingerprint: two of 2^64 texts may share one."""


class Seen:
    """The problems of each part."""

    def __init__(self, path: Path) -> None:
        """`path` is a file to be made."""
        self._rows = sqlite3.connect(path)
        self._rows.execute("PRAGMA synchronous = OFF")
        self._rows.execute("PRAGMA journal_mode = OFF")
        self._rows.execute(
            "CREATE TABLE seen (part TEXT, exact BLOB, alike BLOB, answer BLOB, name TEXT, PRIMARY KEY (part, exact)) "
            "WITHOUT ROWID"
        )
        self._rows.execute(
            "CREATE TABLE names (part TEXT, name TEXT, PRIMARY KEY (part, name)) WITHOUT ROWID"
        )

    def add(
        self, part: str, found: Checked
    ) -> Literal["new", "duplicates", "duplicates with another answer"]:
        """Adds a problem unless the part has it, and returns what it is."""
        exact, answer = fingerprint(found.text), fingerprint(found.answer)
        values = (part, exact, fingerprint(normalised(found.text)), answer, found.id)
        if self._rows.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?, ?, ?)", values).rowcount:
            return "new"
        query = "SELECT answer FROM seen WHERE part = ? AND exact = ?"
        [(first,)] = self._rows.execute(query, (part, exact))
        return "duplicates" if first == answer else "duplicates with another answer"

    def add_name(self, part: str, name: str) -> bool:
        """Returns whether the part has no problem of that id yet."""
        return bool(self._rows.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (part, name)).rowcount)

    def alike(self, part: str) -> int:
        """Returns how many of a part's problems are another's but for what `normalised` takes away."""
        query = "SELECT COUNT(*) - COUNT(DISTINCT alike) FROM seen WHERE part = ?"
        return int(self._rows.execute(query, (part,)).fetchone()[0])

    def overlap(self, first: str, second: str) -> dict[str, Any]:
        """Returns what two parts have in common: `exact` problems of the second stand in the first, character for
        character; `alike` further ones do but for what `normalised` takes away; `examples` are ids of some, in the
        first and in the second."""
        self._rows.execute("CREATE INDEX IF NOT EXISTS by_alike ON seen (alike)")
        counts: dict[str, int] = {}
        for key in ("exact", "alike"):
            query = (
                f"SELECT COUNT(*) FROM seen b WHERE b.part = ? AND EXISTS "
                f"(SELECT 1 FROM seen a WHERE a.part = ? AND a.{key} = b.{key})"
            )
            [(counts[key],)] = self._rows.execute(query, (second, first))
        query = (
            "SELECT a.name, b.name FROM seen b JOIN seen a ON a.alike = b.alike "
            "WHERE a.part = ? AND b.part = ? ORDER BY b.name LIMIT ?"
        )
        examples = [list(pair) for pair in self._rows.execute(query, (first, second, _EXAMPLES))]
        return {"exact": counts["exact"], "alike": counts["alike"] - counts["exact"], "examples": examples}

    def close(self) -> None:
        self._rows.close()


def normalised(text: str) -> str:
    """Returns a text without what seldom makes another problem: white space, case, Unicode's variants."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def fingerprint(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_BYTES).digest()
