"""The two conversions, from what the user names to a directory that is there as a whole or not at all."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.conversion.dtypes import Rounding, named
from sdpo_megatron.conversion.placement import places_of, states_of
from sdpo_megatron.conversion.sources import MegatronSource, find_megatron
from sdpo_megatron.conversion.stored_weights import StoredWeights, Which
from sdpo_megatron.conversion.sums import write_sums
from sdpo_megatron.conversion.to_hf import announced, write_hf
from sdpo_megatron.conversion.to_megatron import dtypes_of, write_megatron
from sdpo_megatron.conversion.verify import check_bits, check_logits
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.files import expand_user, sync_directory
from sdpo_megatron.models.converted import seal, unfinished
from sdpo_megatron.models.hf_tensors import HfTensors
from sdpo_megatron.models.megatron_weights import METADATA
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.models.weight_files import INDEX, SINGLE, check_weights, described, weights_sha256
from sdpo_megatron.preflight.settings import check_layout
from sdpo_megatron.run_dir.export_record import FILE, exported_base, record_export
from sdpo_megatron.terminal import Screen, tell
from sdpo_megatron.trainer.disk import problem_of_disk
from sdpo_megatron.trainer.export import copy_settings
from sdpo_megatron.trainer.model import padded_vocab_size
from sdpo_megatron.trainer.parallel import ParallelState

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of these makes a tokenizer."""
SPARE_BYTES = 50_000_000
"""What a directory takes beside its weights: a tokenizer, mostly."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both conversions may be asked for."""

    dtype: torch.dtype | None = None
    """The type of the result; None: as stored."""
    verify: bool = False


def hf_to_megatron(
    src: str, dst: str, options: Options, *, parallel: ParallelState, tp: int, pp: int
) -> None:
    """Writes `dst`, a torch_dist directory, cut as `tp` * `pp` ranks would; says on the terminal what it does.

    `parallel` is that of a lone rank. Raises UserError for what the user has to mend, RunFailed where it fails."""
    target = _target(dst)
    if (expand_user(src, "SRC") / METADATA).is_file():
        raise UserError(
            f"SRC: {src} has megatron-core's format already, and any layout reads it; name a Hugging Face model."
        )
    model = resolve_model_path(src, key="SRC", announce=tell)
    shape = read_model_shape(model, "SRC")
    check_weights(model, shape, "SRC")
    _check_layout(shape, tp, pp)
    source, rounding = HfTensors(model, "SRC"), Rounding(options.dtype)
    rows = padded_vocab_size(shape.vocab, tp)
    places = places_of(shape, rows)
    kinds = dtypes_of(places, source, rounding)
    size = sum(math.prod(place.sizes) * kind.itemsize for place, kind in zip(places, kinds, strict=True))
    _check_room(target, size)
    for stored in dict.fromkeys(source.dtypes.values()):
        _say_loss(rounding.loss(stored))
    if rows != shape.vocab:
        tell(
            f"The vocabulary's {shape.vocab} rows are padded with {rows - shape.vocab} of zeros, for tp={tp}."
        )
    left_out = sorted(source.files.keys() - dict(described(shape)).keys())
    if left_out:
        tell(f"Left out, because it follows from the rest: {', '.join(left_out)}.")
    with _filled(target) as directory:
        with _progress("reading", source.bytes_of(shape)) as on_bytes:
            states = states_of(shape, parallel)
            write_megatron(
                directory, places, states, source, shape, tp=tp, pp=pp, rounding=rounding, on_bytes=on_bytes
            )
        write_sums(directory)
        _copy_settings(model, directory, None if options.dtype is None else named(options.dtype))
        if (model / FILE).is_file():
            shutil.copyfile(model / FILE, directory / FILE)
        if options.verify:
            _verify(source, StoredWeights(directory, shape), options, parallel)
    _say_rounded(rounding)
    tell(
        f"Wrote {target}: {size:,} bytes of weights, cut for tp={tp} and pp={pp}; any other layout reads it too."
    )


def megatron_to_hf(
    src: str, dst: str, options: Options, *, parallel: ParallelState, whose: Which, model: str | None
) -> None:
    """Writes `dst`, a Hugging Face directory, from a run's checkpoint or from one that megatron-core wrote; says on the
    terminal what it does.

    `parallel` is that of a lone rank. Raises UserError for what the user has to mend, RunFailed where it fails."""
    target = _target(dst)
    source = find_megatron(src, whose, model, tell)
    weights, rounding = source.weights, Rounding(options.dtype)
    tensors = announced(weights, rounding)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _check_room(target, size)
    for stored in dict.fromkeys(weights.reader.dtype_of(weights.key_of(place)) for place in weights.places):
        _say_loss(rounding.loss(stored))
    padding = source.rows - weights.shape.vocab
    if padding:
        tell(f"Left out: {padding} rows that pad the vocabulary to {source.rows}.")
    with _filled(target) as directory:
        with _progress("writing", size) as on_bytes:
            write_hf(directory, weights, rounding=rounding, on_bytes=on_bytes)
        _record(source, directory)
        sizes = Counter[torch.dtype]()
        for tensor in tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        _copy_settings(source.model, directory, named(sizes.most_common(1)[0][0]))
        if options.verify:
            _verify(HfTensors(directory, "DST"), weights, options, parallel)
    _say_rounded(rounding)
    trained = "" if source.steps is None else f", after {source.steps} training steps"
    tell(f"Wrote {target}: {len(tensors)} tensors, {size:,} bytes{trained}.")


def _target(dst: str) -> Path:
    # where a link or `.` leads: a finished directory takes its place by a rename
    target = expand_user(dst, "DST").resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"DST: {target} is there already and is not empty; remove it, or name another directory."
        )
    if target.is_mount():
        raise UserError(f"DST: {target} is where a file system is mounted; name a directory in it.")
    return target


def _check_layout(shape: ModelShape, tp: int, pp: int) -> None:
    try:
        check_layout(ParallelSettings(tp=tp, pp=pp, sequence_parallel=tp > 1), shape)
    except UserError as error:
        message = error.message
        for name in ("tp", "pp"):
            message = message.replace(f"parallel.{name}=", f"--{name} ").replace(
                f"parallel.{name}", f"--{name}"
            )
        raise UserError(message) from None


def _check_room(target: Path, size: int) -> None:
    place = target.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"DST: {place} is no directory; name another one.")
    if not os.access(place, os.W_OK):
        raise UserError(f"DST: {place} cannot be written; name another directory.")
    free = shutil.disk_usage(place).free
    if free < size + SPARE_BYTES:
        raise UserError(
            f"DST: {target} will take {size + SPARE_BYTES:,} bytes, but the disk at {place} has {free:,} left; free "
            "space there, or name another directory."
        )


@contextmanager
def _filled(target: Path) -> Iterator[Path]:
    """Yields the directory to fill, which becomes `target` on leaving."""
    try:
        with unfinished(target) as temporary:
            yield temporary
            seal(temporary)
            temporary.rename(target)
        sync_directory(target.parent)
    except (OSError, RuntimeError) as error:
        # torch closes its file by a RuntimeError where Ctrl-C has stopped the writing
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        problem = problem_of_disk(error)
        if not problem:
            raise
        raise RunFailed(
            f"DST: {target} cannot be written ({problem}); free space, or name another directory."
        ) from error


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    screen = Screen()
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _copy_settings(model: Path, directory: Path, dtype: str | None) -> None:
    copy_settings(model, directory, dtype)
    if not any((directory / name).is_file() for name in TOKENIZERS):
        tell(
            f"Note: {model} has no tokenizer, and so the result has none; copy its {' or '.join(TOKENIZERS)} into it."
        )


def _record(source: MegatronSource, directory: Path) -> None:
    """What the weights say of themselves, as far as it is known."""
    if source.steps is None:
        if source.model == source.weights.directory and (source.model / FILE).is_file():
            shutil.copyfile(source.model / FILE, directory / FILE)
        return
    base = exported_base(source.model)
    if base is None and any((source.model / name).is_file() for name in (SINGLE, INDEX)):
        base = weights_sha256(source.model)
    if base is not None:
        record_export(directory, source.steps, base)


def _verify(hf: HfTensors, megatron: StoredWeights, options: Options, parallel: ParallelState) -> None:
    with _progress("comparing", hf.bytes_of(megatron.shape)) as on_bytes:
        count = check_bits(hf, megatron, options.dtype, on_bytes)
    apart = check_logits(hf.directory, megatron, options.dtype, parallel)
    tell(
        f"Verified: {count} tensors are the same to the bit, and log-probabilities of transformers and of the trainer "
        f"are {apart:.1e} nats apart at most."
    )


def _say_loss(loss: str) -> None:
    if loss:
        tell(f"Note: {loss}")


def _say_rounded(rounding: Rounding) -> None:
    if rounding.changed:
        tell(f"{rounding.changed:,} of {rounding.weights:,} weights are other numbers now.")
