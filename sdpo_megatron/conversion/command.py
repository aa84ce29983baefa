"""The command line of conversions."""

import argparse
import signal
import sys
from collections.abc import Sequence

from sdpo_megatron.stopping import install_stop_signals
from sdpo_megatron.terminal import escape_what_cannot_be_shown, reported, tell

DTYPES = ("float32", "bfloat16", "float16")
DESCRIPTION = """\
Moves weights between Hugging Face directories and megatron-core's, tensor by tensor, without losing a bit of them.

    hf-to-megatron SRC DST     SRC: a directory, a Hub id or package:NAME, as model.path
    megatron-to-hf SRC DST     SRC: a run (its newest checkpoint), RUN@STEP, a checkpoint, or a torch_dist directory

DST is made, whole or not at all, with config.json, tokenizer and chat template beside the weights."""


def main(argv: Sequence[str], program: str = "python -m sdpo_megatron.conversion") -> int:
    """Converts what `argv` asks for and returns the exit code: 0 done; 2 the user's to mend; 1 it failed; 128 and the
    number of the signal that stopped it, which leaves nothing."""
    escape_what_cannot_be_shown()
    options = _parse(argv, program)

    def work() -> int:
        # these take seconds to import
        import torch

        from sdpo_megatron.conversion.convert import Options, hf_to_megatron, megatron_to_hf
        from sdpo_megatron.trainer.alone import only_rank

        both = Options(dtype=options.dtype and getattr(torch, options.dtype), verify=options.verify)
        src, dst = options.src, options.dst
        with only_rank("cpu") as parallel:
            if options.direction == "hf-to-megatron":
                hf_to_megatron(src, dst, both, parallel=parallel, tp=options.tp, pp=options.pp)
            else:
                megatron_to_hf(src, dst, both, parallel=parallel, whose=options.weights, model=options.model)
        return 0

    def interrupt() -> None:
        raise KeyboardInterrupt

    stop = install_stop_signals()
    try:
        with stop.interrupting(interrupt):
            return reported(work)
    except KeyboardInterrupt:
        tell("Stopped; nothing was written.", sys.stderr)
        return 128 + (stop.signal or signal.SIGINT)


def _parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = parser.add_subparsers(
        dest="direction", required=True, metavar="hf-to-megatron|megatron-to-hf"
    )
    there = directions.add_parser("hf-to-megatron", help="a Hugging Face directory for megatron-core")
    back = directions.add_parser("megatron-to-hf", help="a checkpoint as a Hugging Face directory")
    for one in (there, back):
        one.add_argument("src", metavar="SRC")
        one.add_argument("dst", metavar="DST", help="a directory that is not there, or is empty")
        one.add_argument("--dtype", choices=DTYPES, help="the type of the result; by default as stored")
        one.add_argument(
            "--verify",
            action="store_true",
            help="compare each tensor, and logits of transformers and of the trainer; takes memory for both",
        )
    there.add_argument(
        "--tp", type=_size, default=1, metavar="N", help="tensor-parallel ranks to cut for (1)"
    )
    there.add_argument("--pp", type=_size, default=1, metavar="N", help="pipeline stages to cut for (1)")
    back.add_argument(
        "--weights",
        choices=("policy", "teacher"),
        default="policy",
        help="of a run's checkpoint: what was trained, or the moving average that taught it (teacher.name=ema)",
    )
    back.add_argument("--model", metavar="DIR", help="the Hugging Face model that the weights are of")
    return parser.parse_args(argv)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of ranks; give 1 or more")
    return int(text)
