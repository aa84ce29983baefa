"""What a checkpoint or a Hugging Face directory holds, and whether it is whole.

    python tools/inspect_checkpoint.py runs/x@000120 --verify
    python tools/inspect_checkpoint.py Qwen/Qwen3-8B

PATH is a run (its newest checkpoint), RUN@STEP, a checkpoint's directory, or a Hugging Face directory or id. The exit
code is 1 where it is not whole; what is wrong then stands in a line each.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.models.directory_contents import directory_contents
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.run_dir.checkpoint_files import find_checkpoint, read_manifest
from sdpo_megatron.terminal import reported, tell

NAMED = (
    "architecture",
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "ffn",
    "vocab",
    "tie_embeddings",
)
"""Of a model's shape, what is shown."""
SETTINGS = ("model.path", "model.revision", "model.dtype", "loss.name", "teacher.name", "run.seed")
"""Of a run's identity, likewise."""


def main() -> int:
    options = parse()
    found = contents(options.path, options.verify)
    if options.json:
        tell(json.dumps(found, indent=1))
    else:
        for line in lines(found):
            tell(line)
    return 0 if found["whole"] else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything: a checkpoint's files against their SHA-256, a model's numbers for NaN",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every file and tensor's name")
    return parser.parse_args()


def contents(text: str, verify: bool) -> dict[str, Any]:
    """Raises UserError for what is neither."""
    checkpoint = find_checkpoint(text)
    if checkpoint is not None:
        # imports torch, which takes seconds
        from sdpo_megatron.trainer.checkpoint_contents import checkpoint_contents

        return checkpoint_contents(checkpoint, verify=verify) | {"beside": beside(checkpoint)}
    directory = resolve_model_path(text, announce=lambda line: tell(line, sys.stderr), key="PATH")
    if not directory.is_dir():
        raise UserError(
            f"{text} is no directory or run; give a checkpoint, RUN@STEP, or a Hugging Face directory."
        )
    return directory_contents(directory, verify=verify)


def beside(checkpoint: Path) -> dict[str, bool]:
    """Other checkpoints of the same run, and whether each is whole."""
    if not checkpoint.name.isdecimal():
        return {}
    others = [path for path in sorted(checkpoint.absolute().parent.iterdir()) if path.name.isdecimal()]
    return {path.name: read_manifest(path) is not None for path in others if path.name != checkpoint.name}


def lines(found: dict[str, Any]) -> Iterator[str]:
    yield found["path"]
    rows = checkpoint_rows(found) if found["kind"] == "checkpoint" else model_rows(found)
    for name, value in rows:
        yield f"  {name:<11} {value}"
    if found.get("parts"):
        yield ""
        yield from table(found["parts"])
    if found["problems"]:
        yield ""
    for problem in found["problems"]:
        yield f"problem: {problem}"


def checkpoint_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "whole",
        whole(
            found,
            f"by name and size of {counted(len(found['files']), 'file')}",
            "by the SHA-256 of each file",
        ),
    )
    if "step" in found:
        layout = " ".join(f"{key}={value}" for key, value in found["layout"].items())
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        yield "step", str(found["step"])
        yield "written by", f"{layout}; {versions}; format {found['format']}"
        yield "model", shape_in_words(found)
        settings = [f"{key}={found['identity'][key]}" for key in SETTINGS if key in found["identity"]]
        yield "run", " ".join(settings) or "says nothing of itself"
        if found["reference"]:
            yield "teacher", "{directory}, SHA-256 {sha256}".format(**found["reference"])
        yield "SHA-256", found["manifest.json_sha256"]
    yield "size", f"{size(found['bytes'])} in {counted(len(found['files']), 'file')}"
    if found["beside"]:
        yield (
            "beside it",
            ", ".join(name if ok else f"{name} (not whole)" for name, ok in found["beside"].items()),
        )


def model_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "whole", whole(found, "by the headers of its files", "every number is finite")
    if found["model"] is not None:
        yield "model", shape_in_words(found)
    types = ", ".join(f"{dtype} ({counted(x['tensors'], 'tensor')})" for dtype, x in found["dtypes"].items())
    yield "tensors", f"{found['tensors']}: {types or 'none'}"
    if found.get("left_out"):
        yield "not used", ", ".join(found["left_out"])
    if found["trained_steps"] is not None:
        yield "export", f"after {found['trained_steps']} steps from weights {found['trained_from_sha256']}"
    if "weights_sha256" in found:
        yield "SHA-256", f"{found['weights_sha256']} (of the weights, however they are spread over files)"
    yield "size", f"{size(found['bytes'])} in {counted(len(found['files']), 'file')}"


def whole(found: dict[str, Any], seen: str, read: str) -> str:
    if not found["whole"]:
        return "no"
    return f"yes, {read}" if found["verified"] else f"yes, {seen} (--verify reads them)"


def shape_in_words(found: dict[str, Any]) -> str:
    named = " ".join(f"{key}={found['model'][key]}" for key in NAMED if key in found["model"])
    return f"{named}; {found['parameters']:,} numbers" if found.get("parameters") else named


def table(parts: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"  {'part':<34} {'tensors':>7} {'numbers':>16} {'size':>10}  type"
    for part in parts:
        counts = f"{part['tensors']:>7} {part['numbers']:>16,}" if part["tensors"] else " " * 24
        yield f"  {part['name']:<34} {counts} {size(part['bytes']):>10}  {', '.join(part['dtypes'])}".rstrip()


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    sys.exit(reported(main))
