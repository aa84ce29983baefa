"""One hash for each tensor and one for all of them; of two sets of weights, whether they are the same.

    python tools/hash_weights.py Qwen/Qwen3-8B
    python tools/hash_weights.py runs/x@000120 runs/x/hf
    python tools/hash_weights.py runs/x@000120 http://127.0.0.1:30000

WEIGHTS is a Hugging Face directory or id, a run (its newest checkpoint), RUN@STEP, a checkpoint's directory, or the URL
of an SGLang server. Of two, tensors that differ are named, and the exit code is 1 where there are any.
"""

import argparse
import json
import sys

import torch

from sdpo_megatron.config import ServerSettings
from sdpo_megatron.preflight.server import check_server, read_api_key
from sdpo_megatron.serving.weight_hashes import (
    Difference,
    Weights,
    by_name,
    compare,
    is_url,
    open_weights,
    whole,
)
from sdpo_megatron.terminal import reported, tell

SHOWN = 20
"""Names of a kind that are shown of a comparison; all of them with --json."""


def main() -> int:
    options = parse()
    urls = [text for text in options.sources if is_url(text)]
    settings = ServerSettings(urls=urls, api_key_file=options.api_key_file)
    if urls or options.api_key_file is not None:
        check_server(settings)
    api_key = read_api_key(settings)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    opened = [
        open_weights(
            text,
            which=options.weights,
            dtype=dtype,
            api_key=api_key,
            announce=lambda line: tell(line, sys.stderr),
        )
        for text in options.sources
    ]
    if len(opened) == 1:
        show(opened[0], options)
        return 0
    found = compare(opened[0], opened[1])
    show_difference(found, options)
    return 0 if found.same else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="WEIGHTS")
    parser.add_argument(
        "--weights", choices=("policy", "teacher"), default="policy", help="which of a checkpoint's"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="hash tensors as they are in this type, as trainer and server load them (default: as stored)",
    )
    parser.add_argument(
        "--server-tp",
        type=int,
        metavar="N",
        help="show the hashes that a server of N ranks on a CPU says of these files",
    )
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="holds the server's key, for you alone to read"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if len(options.sources) > 2:
        parser.error(f"{len(options.sources)} sets of weights are given; give one, or two to compare")
    if options.server_tp is not None and (len(options.sources) == 2 or options.server_tp < 1):
        parser.error(
            "--server-tp is a number of ranks from 1 on, for one set of weights; two find it out themselves"
        )
    return options


def show(weights: Weights, options: argparse.Namespace) -> None:
    hashes = by_name(weights, options.server_tp)
    if options.json:
        tensors = {
            name: {"hash": x.hash, "dtype": x.dtype, "size": list(x.size)} for name, x in hashes.items()
        }
        tell(json.dumps({"tensors": tensors, "whole": whole(hashes)}, indent=1))
        return
    for name, hashed in hashes.items():
        kind = f"{hashed.dtype:8} {list(hashed.size)!s:16} " if hashed.dtype else ""
        tell(f"{hashed.hash} {kind}{name}")
    tell(f"{whole(hashes)} whole, of {len(hashes)} tensors")


def show_difference(found: Difference, options: argparse.Namespace) -> None:
    first, second = options.sources
    if options.json:
        tell(json.dumps({"same": found.same, **vars(found)}, indent=1))
        return
    for what, names in (
        ("differs", found.differing),
        (f"only in {first}", found.only_first),
        (f"only in {second}", found.only_second),
    ):
        for name in names[:SHOWN]:
            tell(f"{what}: {name}")
        if len(names) > SHOWN:
            tell(f"{what}: {len(names) - SHOWN} more")
    if found.same:
        tell(f"the same weights: all {found.compared} tensors are equal")
        return
    tell(f"not the same weights: {len(found.differing)} of {found.compared} tensors differ")
    if found.types is not None:
        first_type, second_type = found.types
        tell(
            f"one holds {first_type}, the other {second_type}: --dtype bfloat16 hashes files as rounded to that"
        )


if __name__ == "__main__":
    sys.exit(reported(main))
