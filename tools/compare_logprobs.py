"""Server against trainer on the same tokens: the first thing to run on a new model.

    python tools/compare_logprobs.py Qwen/Qwen3-0.6B
    python tools/compare_logprobs.py DIR --dtype float32 --server http://127.0.0.1:30000

Starts an SGLang server of MODEL, or asks one that runs; loads MODEL into the trainer, on one rank in this process; and
has both say the log-probabilities of texts that the server reads and of tokens that it samples. Shows mean, 90%
quantile and largest difference by depth, and whether both find the same token likeliest; then whether they agree: the
difference is held against what rounding to the type makes of the same tokens in either (the trainer in float32 shows
it), times weight_sync.canary_factor's default. The exit code is 0 where they do, 1 where they do not.
"""

import argparse
import inspect
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from sdpo_megatron.config import ServerSettings, WeightSyncSettings
from sdpo_megatron.errors import RunFailed, ServerLost, UserError
from sdpo_megatron.files import read_text
from sdpo_megatron.launch.processes import Guard
from sdpo_megatron.launch.server import ServedModel, ServerProcess
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.models.weight_files import check_weights
from sdpo_megatron.preflight.checked import count_gpus
from sdpo_megatron.preflight.memory import (
    COUNTED_FRACTION,
    ITEM,
    PROCESS_BYTES,
    SERVER_PROCESSES,
    ServerMemory,
    bytes_free,
    parameter_count,
)
from sdpo_megatron.preflight.server import check_server, read_api_key
from sdpo_megatron.preflight.settings import check_tokenizer_file
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.serving.engines_compared import (
    BEGIN_TOKENS,
    Row,
    Token,
    Verdict,
    compare_engines,
    description,
    judge,
    load_tokenizer,
    text_ids,
    texts_of,
)
from sdpo_megatron.serving.recovery import check_served_model
from sdpo_megatron.terminal import reported, tell

FACTOR = WeightSyncSettings().canary_factor
SHOWN = 8
"""Tokens that differ most."""


def main() -> int:
    options = parse()
    settings = server_settings(options)
    model = resolve_model_path(options.model, announce=say, key="MODEL")
    shape = read_model_shape(model, "MODEL")
    check_weights(model, shape, "MODEL")
    check_tokenizer_file(model, "MODEL")
    device = "cuda" if count_gpus() else "cpu"
    tokenizer = load_tokenizer(model)
    longest = min(options.tokens, shape.max_positions)
    texts = texts_of(text_ids(tokenizer, text_of(options.text), shape.vocab), longest)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with ExitStack() as at_the_end:
            found, weights = compared(options, settings, model, shape, device, texts, at_the_end)
    except ServerLost as error:
        raise RunFailed(str(error)) from None
    verdict = judge(found, FACTOR)
    if weights:
        verdict = Verdict(verdict.rows, [weights, *verdict.reasons])
    if options.json:
        tell(
            json.dumps({"model": str(model), "dtype": options.dtype, **description(found, verdict)}, indent=1)
        )
    else:
        show(found, verdict, tokenizer, options.dtype)
    return 0 if verdict.agree else 1


def say(line: str) -> None:
    tell(line, sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory or id, or package:NAME")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="in which both compute; that of a running server (default: %(default)s)",
    )
    parser.add_argument("--server", metavar="URL", help="a server of MODEL that runs already")
    parser.add_argument("--api-key-file", metavar="FILE", help="holds its key, for you alone to read")
    parser.add_argument(
        "--python",
        default=ServerSettings().python,
        help="interpreter of the environment that holds SGLang (default: %(default)s)",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what is read (default: Python's argparse.py)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=1536,
        help="of the longest text, if the model takes so many (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=64, help="tokens of each sampled text (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every token")
    options = parser.parse_args()
    if options.tokens < 32 or options.samples < 1:
        parser.error("--tokens must be at least 32, and --samples at least 1")
    return options


def server_settings(options: argparse.Namespace) -> ServerSettings:
    urls = [options.server] if options.server else []
    settings = ServerSettings(urls=urls, api_key_file=options.api_key_file, python=options.python)
    check_server(settings)
    return settings


def text_of(file: Path | None) -> str:
    if file is None:
        return inspect.getsource(argparse)
    try:
        return read_text(file)
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8; give a text.") from None


def compared(
    options: argparse.Namespace,
    settings: ServerSettings,
    model: Path,
    shape: ModelShape,
    device: Literal["cpu", "cuda"],
    texts: list[list[int]],
    at_the_end: ExitStack,
) -> tuple[list[Token], str]:
    """Returns the tokens, and what is wrong with the server's weights, empty for nothing."""
    # import megatron-core, which takes seconds
    from sdpo_megatron.trainer.alone import AloneModel, only_rank

    longest = max(len(texts[0]), BEGIN_TOKENS + options.samples) + 1
    if settings.urls:
        client = running(settings, shape)
    else:
        check_memory(shape, options.dtype, device, settings)
        server = started(settings, model, options.dtype, device, longest, at_the_end)
        client = Client(server.url, server.api_key)
    say(f"Loading {model} into the trainer, in {options.dtype} on {device}")
    alone = AloneModel(model, shape, options.dtype, at_the_end.enter_context(only_rank(device)))
    if not settings.urls:
        say("Waiting for the server")
        server.wait_healthy()
    weights = wrong_weights(model, options.dtype, client)
    return compare_engines(alone, client, texts, options.samples, shape.eos_ids), weights


def running(settings: ServerSettings, shape: ModelShape) -> Client:
    client = Client(settings.urls[0], read_api_key(settings))
    if not client.healthy():
        raise UserError(
            f"no server answers at {client.url}; start it, or leave --server out to have one started."
        )
    check_served_model(Path(client.model_info()["model_path"]), shape, client.url)
    return client


def check_memory(
    shape: ModelShape, dtype: str, device: Literal["cpu", "cuda"], settings: ServerSettings
) -> None:
    item = ITEM[dtype]
    wide = 4 if dtype != "float32" else 0
    needed = parameter_count(shape) * (2 * item + wide) + (SERVER_PROCESSES + 1) * PROCESS_BYTES
    free = bytes_free(device, settings)
    if needed > free:
        raise UserError(
            f"server and trainer need at least {needed / 2**30:.2f} GiB of this model, but there are "
            f"{free / 2**30:.2f} GiB; take a smaller one of its family, or give --server of one elsewhere."
        )


def started(
    settings: ServerSettings,
    model: Path,
    dtype: Literal["float32", "bfloat16"],
    device: Literal["cpu", "cuda"],
    longest: int,
    at_the_end: ExitStack,
) -> ServerProcess:
    """Returns a server that is still loading; `at_the_end` stops it."""
    scratch = Path(at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="compare-logprobs-")))
    served = ServedModel(
        path=model,
        dtype=dtype,
        device=device,
        context_length=longest,
        max_responses=16,
        memory=ServerMemory(fraction=COUNTED_FRACTION, cache_tokens=4 * longest),
        seed=0,
    )
    guard = Guard()
    at_the_end.callback(guard.close)
    server = ServerProcess(settings, served, scratch / "server.log")
    at_the_end.callback(server.stop)
    say(f"Starting an SGLang server of {model}")
    server.start(guard)
    return server


def wrong_weights(model: Path, dtype: str, client: Client) -> str:
    """Says by hashes which of the server's weights are not MODEL's; empty where all are, or it cannot say."""
    import torch

    from sdpo_megatron.serving.weight_hashes import Files, Served, compare

    files = Files(str(model), "policy", getattr(torch, dtype), say)
    try:
        difference = compare(files, Served(client))
    except UserError as error:
        say(f"Not compared by hashes: {error}")
        return ""
    names = difference.differing + difference.only_first
    if not names:
        say(f"By its hashes the server holds these weights ({difference.compared} parameters)")
        return ""
    return f"the server holds other weights in {len(names)} of {difference.compared} parameters, such as {names[0]}"


def show(tokens: list[Token], verdict: Verdict, tokenizer: Any, dtype: str) -> None:
    tell(
        f"{'tokens':<22} {'count':>6} {'mean':>9} {'90%':>9} {'largest':>9}   {'rounding explains':<19} same likeliest"
    )
    for row in verdict.rows:
        tell(line_of(row))
    tell("\nDifferences in nats. Where they are largest:")
    tell(f"{'':9} {'text':>4} {'place':>6} {'server':>10} {'trainer':>10} {'difference':>11}  token")
    for token in sorted(tokens, key=lambda token: -token.gap)[:SHOWN]:
        numbers = f"{token.server:>10.4f} {token.trainer:>10.4f} {token.gap:>11.2g}"
        tell(f"{token.part:9} {token.text:>4} {token.place:>6} {numbers}  {tokenizer.decode([token.id])!r}")
    tell("")
    for reason in verdict.reasons:
        tell(f"apart: {reason}")
    if verdict.agree:
        wholes = [row for row in verdict.rows if row.last is None]
        figures = "; ".join(
            f"{row.part}: {row.gap.mean:.2g} of {row.allowed.mean:.2g} allowed" for row in wholes
        )
        tell(f"Server and trainer agree in {dtype} (mean difference, {figures}).")
    else:
        tell(f"Server and trainer do NOT compute the same in {dtype}: do not train before you know why.")


def line_of(row: Row) -> str:
    depth = "all"
    if row.last is not None:
        depth = f"{row.first} and on" if row.last > 1 << 30 else f"{row.first}-{row.last - 1}"
    numbers = f"{row.gap.mean:>9.2g} {row.gap.high:>9.2g} {row.largest:>9.2g}"
    allowed = (
        f"{row.allowed.mean:.2g}, {row.allowed.high:.2g}" if row.last is None else f"{row.allowed.mean:.2g}"
    )
    likeliest = f"{row.agreed / row.asked:.1%}" if row.asked else ""
    if row.asked > row.agreed:
        likeliest += f" (margins of the rest: up to {row.margin:.2g})"
    mark = "  APART" if row.apart else ""
    return f"{row.part:<8} {depth:<13} {row.tokens:>6} {numbers}   {allowed:<19} {likeliest}{mark}".rstrip()


if __name__ == "__main__":
    sys.exit(reported(main))
