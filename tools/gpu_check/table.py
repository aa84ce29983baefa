"""A part's rows as aligned text."""

from collections.abc import Sequence
from typing import Any


def table(name: str, status: str, reason: str, seconds: float, rows: Sequence[dict[str, Any]]) -> str:
    """Returns a title, then the rows; rows with other figures than those before them begin a new block."""
    blocks: list[list[dict[str, Any]]] = []
    for row in rows:
        if not blocks or not _same_figures(row, blocks[-1][0]):
            blocks.append([])
        blocks[-1].append(row)
    title = f"\n== {name}: {status}, {seconds:.0f} s" + (f" ({reason})" if reason else "")
    return "\n\n".join([title, *map(_block, blocks)])


def _same_figures(row: dict[str, Any], first: dict[str, Any]) -> bool:
    """Rows without figures go with any."""
    return "skipped" in row or "failed" in row or bool(row.keys() & first.keys() - {"what", "ok"})


def _block(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_shown(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
