"""Makes files of problems that the environments read, from a published set or from files of one's own.

    .venv/bin/python tools/prepare_data.py gsm8k --out data/gsm8k
    .venv/bin/python tools/prepare_data.py DIR --as gsm8k --out data/gsm8k
    .venv/bin/python tools/prepare_data.py mine.csv --env jsonl --fields prompt=question,answer=target --out data/mine
    .venv/bin/python tools/prepare_data.py --list

The first form downloads the set; the second takes its files where they lie: a directory as downloaded, or the file (of
held-out problems too: --test). The third reads JSON lines, a JSON list, CSV or parquet, under other names of columns.

Written are train.jsonl and test.jsonl, or what of them the set has, and manifest.json: where the rows come from, how
many, by which rule they are split, what was dropped, what the parts have in common, and each file's SHA-256. All of it
is there at the end, or nothing.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdpo_megatron.data.prepare import Request, prepare
from sdpo_megatron.data.sets import SETS
from sdpo_megatron.data.sets.base import DataSet
from sdpo_megatron.envs.base import look_up
from sdpo_megatron.errors import ConfigError, ReportedError, one_line


def main() -> int:
    options = parse()
    if options.list:
        for name, found in SETS.items():
            print(f"{name:22} {found.env:16} {found.what}")
        return 0
    try:
        request = requested(options)
        manifest = prepare(request)
    except ReportedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        return 130
    show(request, manifest)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="NAME|PATH", help="a set of --list, or files that lie here")
    add("--out", type=Path, help="the directory to make")
    add("--list", action="store_true", help="show the sets")
    add("--as", dest="name", metavar="NAME", help="the set whose files PATH has")
    add("--env", help="the environment that will read PATH's problems")
    add("--fields", type=pairs, default={}, metavar="OURS=THEIRS,...", help="PATH's columns, with --env")
    add("--option", type=pairs, action="append", default=[], metavar="KEY=VALUE", help="of task.options")
    add("--test", type=Path, metavar="PATH", help="the file of held-out problems")
    add("--only", choices=("train", "test"), help="of a set that has both: this part alone")
    add("--revision", help="branch, tag or commit to download, in place of the one that is noted here")
    add("--split", default="", help="one of a set's ways to split")
    add("--share", type=share, help="of problems to hold out where a set does not say which (0.1)")
    add("--seed", type=int, default=0, help="of that share")
    add(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="prepared files; shows the overlap",
    )
    add("--leave-out-unreadable", action="store_true", help="drop and count rows that cannot be read")
    options = parser.parse_args()
    if not options.list and (options.source is None or options.out is None):
        parser.error("name a set or a path, and --out")
    return options


def pairs(text: str) -> dict[str, str]:
    found = [part.partition("=") for part in text.split(",")]
    if not all(ours and equals and theirs for ours, equals, theirs in found):
        raise argparse.ArgumentTypeError(f"{text} is not of the form name=value,name=value")
    return {ours.strip(): theirs.strip() for ours, _, theirs in found}


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("a share is at least 0 and less than 1")
    return value


def requested(options: argparse.Namespace) -> Request:
    name, path = options.name, Path(options.source)
    if name is None and options.env is not None and options.only is not None:
        raise ConfigError(
            "--only is for a set of --list that has both parts; of your own files name just one."
        )
    if name is None and options.env is None:
        if options.source.lower() not in SETS and path.exists():
            raise ConfigError(
                f"{path} is a path: say by --as of which set, or by --env for which environment."
            )
        name, path = options.source, None
    if name is not None and (options.env is not None or options.fields or options.option):
        raise ConfigError(
            f"{name} has its own environment and fields; leave --env, --fields and --option away."
        )
    if path is None and options.test is not None:
        raise ConfigError(f"--test is the file beside a PATH, and {name} is downloaded; leave it away.")
    found = own(options) if name is None else published(name.lower(), options)
    name = str(path) if name is None else name.lower()
    if options.split and options.split not in found.variants:
        ways = ", ".join(found.variants) or "none to choose"
        raise ConfigError(f"--split {options.split}: of {name} there are these ways to split: {ways}.")
    shares = "all" in found.files and (found.part_of is None or options.split == "held_out")
    if options.share is not None and not shares:
        raise ConfigError(f"--share: {name} is split by a rule of its own ({found.split}); leave it away.")
    return Request(
        name=name,
        found=found,
        out=options.out,
        path=path,
        test=options.test,
        fields=options.fields,
        variant=options.split,
        share=0.1 if options.share is None else options.share,
        seed=options.seed,
        leave_out_unreadable=options.leave_out_unreadable,
        against=tuple(options.against),
        command=shlex.join(["tools/prepare_data.py", *sys.argv[1:]]),
    )


def published(name: str, options: argparse.Namespace) -> DataSet:
    found = look_up("set of problems", name, SETS)
    if options.revision is not None and found.origin is not None:
        found = replace(found, origin=replace(found.origin, revision=options.revision))
    if options.only is not None:
        if options.only not in found.files:
            raise ConfigError(
                f"--only {options.only}: the files of {name} are not told apart so; leave it away."
            )
        found = replace(found, files={options.only: found.files[options.only]})
    return found


def typed(text: str) -> Any:
    """A number or a truth value of an option; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def own(options: argparse.Namespace) -> DataSet:
    """Somebody's own files."""
    settings = {key: typed(value) for part in options.option for key, value in part.items()}
    files: dict[str, tuple[str, ...]] = {"all": ("*",)} if options.test is None else {"train": (), "test": ()}
    rule = "" if options.test is None else "the files as given"
    return DataSet(what="own files", env=options.env, options=settings, files=files, split=rule)


def show(request: Request, manifest: dict[str, Any]) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in manifest["counts"].items())
    print(f"{request.name}: {counts}. Split: {manifest['split']}.")
    for part, expected in request.found.rows.items():
        kept = sum(file["kept"] for file in manifest["source"]["files"] if file["part"] == part)
        if kept != expected:
            print(f"Note: {part} has {kept} problems here, and {expected} as published.")
    for overlap in manifest["overlap"]:
        if overlap["of"] == overlap["and"]:
            print(
                f"{overlap['of']}: {overlap['alike']} problems are like another but for white space and case."
            )
        else:
            examples = "; for example " + ", ".join(f"{a} and {b}" for a, b in overlap["examples"])
            print(
                f"Of {overlap['and']}, {overlap['exact']} problems are in {overlap['of']} too, and {overlap['alike']} "
                f"more but for white space and case{examples if overlap['examples'] else ''}."
            )
    if manifest["unreadable"]:
        print(f"Unreadable, the first: {one_line(manifest['unreadable'][0])}")
    if manifest["note"]:
        print(f"Note: {manifest['note']}.")
    written = " ".join(f"task.options.{key}={value}" for key, value in manifest["options"].items())
    print(f"Wrote {request.out}. To use it: task.env={manifest['env']} {written}")


if __name__ == "__main__":
    sys.exit(main())
