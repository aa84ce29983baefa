"""Files of problems, row by row: JSON lines or one JSON list, CSV, parquet; the first three also in gzip.

Whatever is wrong with a file ends in one line that names it, and the line where there is one.
"""

import codecs
import csv
import gzip
import io
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdpo_megatron.envs.data.json_text import read_list, read_object
from sdpo_megatron.envs.data.lines import IN_OPTIONS, Line, Named, mapped
from sdpo_megatron.errors import UserError, quoted
from sdpo_megatron.files import check_downloaded, expand_user, open_regular

_PARQUET_ROWS = 64
"""Rows that are in memory at a time; one may hold megabytes of tests."""


def read_lines(
    path: str | Path, fields: Mapping[str, str], example: str, named: Named = IN_OPTIONS
) -> Iterator[Line]:
    """Yields the rows of a file in its order, blank lines skipped. What is in memory does not grow with the file.

    Raises UserError, which names file and line."""
    path = expand_user(str(path), named.paths)
    try:
        for where, number, columns, values in _rows(path, example):
            ours = mapped(values, columns, fields, where, named)
            yield Line(where, number, ours, fields, columns, _is_csv(path), named)
    except FileNotFoundError:
        raise UserError(f"There is no problem file {path}: correct its path in {named.paths}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory: name a file of problems in {named.paths}.") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: its permissions forbid it.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); get it again.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8.") from None


_Binary = gzip.GzipFile | io.BufferedReader
_Rows = Iterator[tuple[str, int, Collection[str], dict[str, Any]]]
"""Where a row stands, its number, the columns that there are, and the values of those that are not empty."""


def _rows(path: Path, example: str) -> _Rows:
    check_downloaded(path)
    with open_regular(path) as plain:
        magic = plain.read(4)
    if magic == b"PAR1":
        yield from _parquet(path)
        return
    with gzip.open(path) if magic.startswith(b"\x1f\x8b") else path.open("rb") as file:
        if _is_csv(path):
            yield from _csv(file, path)
        elif file.peek(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            text = io.TextIOWrapper(file, encoding="utf-8-sig")
            for place, values in read_list(text, str(path), example):
                yield f"{path} entry {place}", place, [*values], values
        else:
            yield from _json_lines(file, path, example)


def _is_csv(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".csv")


def _json_lines(file: _Binary, path: Path, example: str) -> _Rows:
    for number, data in enumerate(file, start=1):
        where = f"{path} line {number}"
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8; save the file as UTF-8.") from None
        if text.strip():
            values = read_object(text, where, example)
            yield where, number, [*values], values


def _csv(file: _Binary, path: Path) -> _Rows:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    columns: list[str] = []
    number = 1
    try:
        for cells in reader:
            where, number = f"{path} line {number}", reader.line_num + 1
            if not any(cells):
                continue
            if not columns:
                columns = cells
                twice = next((name for name in columns if columns.count(name) > 1), None)
                if twice is not None:
                    raise UserError(f"{where}: the column {quoted(twice)} is there twice; rename one.")
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{where}: {len(cells)} cells under {len(columns)} columns; quote text with commas or line breaks."
                )
            filled = zip(columns, cells, strict=True)
            yield where, reader.line_num, columns, {name: cell for name, cell in filled if cell}
    except csv.Error as error:
        raise UserError(f"{path} line {number}: not CSV ({error}); correct it.") from None


def _parquet(path: Path) -> _Rows:
    # takes a tenth of a second, which no other format needs
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    present = {key: value for key, value in values.items() if value is not None}
                    yield f"{path} row {number}", number, [*values], present
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is a damaged parquet file ({str(error).splitlines()[0]}); get it again."
        ) from None
