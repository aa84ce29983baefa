"""What ranks run: conversions between Hugging Face directories and megatron-core's."""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.conversion import convert, dist_writing, verify
from sdpo_megatron.conversion.command import main
from sdpo_megatron.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from sdpo_megatron.conversion.stored_weights import Which
from sdpo_megatron.conversion.to_hf import write_hf
from sdpo_megatron.errors import ReportedError, UserError
from sdpo_megatron.models.converted import is_converted
from sdpo_megatron.models.families.base import Rule
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.models.weight_files import check_weights
from sdpo_megatron.trainer.alone import only_rank
from sdpo_megatron.trainer.dist_reading import DistReader
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS, load_hf_weights, stream_hf_weights
from sdpo_megatron.trainer.model import build_model, unwrap
from sdpo_megatron.trainer.parallel import ParallelState, initialize
from tests.distributed.learning import Trainer
from tests.distributed.saving import checkpoints
from tests.large_model import make_large_model

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip

EXACT = Options()
LAYOUTS = ((1, 1), (3, 1), (1, 2), (3, 2))
"""Tensor-parallel ranks and pipeline stages."""


OPEN = ExitStack()


@cache
def lone() -> ParallelState:
    """A process lays out its grid once, however much it converts."""
    return OPEN.enter_context(only_rank("cpu"))


def there(src: str, dst: str, options: Options = EXACT, *, tp: int = 1, pp: int = 1) -> None:
    hf_to_megatron(src, dst, options, parallel=lone(), tp=tp, pp=pp)


def back(
    src: str,
    dst: str,
    options: Options = EXACT,
    *,
    whose: Which = "policy",
    model: str | None = None,
    parallel: ParallelState | None = None,
) -> None:
    megatron_to_hf(src, dst, options, parallel=parallel or lone(), whose=whose, model=model)


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """How many tensors are equal to the bit; none may differ."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        bits, others = (one.contiguous().view(-1).view(torch.uint8) for one in (found[name], tensor))
        assert torch.equal(bits, others), name
    return len(expected)


def round_trips(model: str, work: str) -> list[int]:
    """Tensors that came back from each layout; then from bfloat16, verified, of the last one. Every chunk of what was
    written is of the rank that would have it."""
    source, counts = Path(model), []
    for tp, pp in LAYOUTS:
        megatron, hf = Path(work) / f"{tp}-{pp}", Path(work) / f"{tp}-{pp}-hf"
        there(model, str(megatron), tp=tp, pp=pp)
        assert len(list(megatron.glob("*.distcp"))) == tp * pp
        back(str(megatron), str(hf))
        counts.append(same(weights(hf), weights(source)))
        assert (hf / "config.json").read_text() == _config_of(source)
    back(str(megatron), str(Path(work) / "half"), Options(dtype=torch.bfloat16, verify=True))
    rounded = {name: one.to(torch.bfloat16) for name, one in weights(source).items()}
    counts.append(same(weights(Path(work) / "half"), rounded))
    return counts


def _config_of(source: Path) -> str:
    return json.dumps(json.loads((source / "config.json").read_text()), indent=2)


def to_megatron(model: str, out: str, tp: int, pp: int) -> None:
    there(model, out, Options(verify=True), tp=tp, pp=pp)


def to_hf(directory: str, out: str, model: str | None = None) -> str:
    """What is said meanwhile."""
    with redirect_stdout(io.StringIO()) as said:
        back(directory, out, Options(verify=True), model=model)
    return said.getvalue()


def by_megatron_core(model: str, directory: str, out: str, layout: dict[str, Any]) -> int:
    """megatron-core itself reads `directory`, which is `model`, in this layout, and writes `out`; the number of this
    rank's weights."""
    parallel = initialize(ParallelSettings(**layout), device=torch.device("cpu"), seed=0)
    shape = read_model_shape(Path(model))
    expected, found = (build_model(shape, torch.float32, parallel) for _ in range(2))
    load_hf_weights(expected, Path(model), shape, parallel)
    described = unwrap(found[0]).sharded_state_dict(prefix="")
    read: Any = dist_checkpointing.load(described, directory)
    unwrap(found[0]).load_state_dict(read)
    theirs = dict(unwrap(found[0]).named_parameters())
    for name, weight in unwrap(expected[0]).named_parameters():
        assert torch.equal(theirs[name], weight), name
    if parallel.is_main:
        Path(out).mkdir()
    parallel.barrier()
    # its writer is a process of its own, which daemons may not start
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    dist_checkpointing.save({"model": unwrap(found[0]).sharded_state_dict(prefix=""), "iteration": 7}, out)
    parallel.barrier()
    queue: Any = filesystem_async._results_queue
    if queue is not None:
        queue._manager.shutdown()
    return len(theirs)


def of_a_run(model: str, directory: str, dtype: str, work: str) -> list[Any]:
    """The newest checkpoint in `directory`, policy and teacher, against what a trainer that goes on from it has."""
    trainer = Trainer(model, {}, dtype=getattr(torch, dtype), teacher={"name": "ema"})
    store = checkpoints(trainer, directory)
    newest = store.newest()
    assert newest is not None and trainer.teacher is not None and trainer.teacher.own is not None
    store.load(newest, trainer.state)
    trainer.teacher.show_average()
    result: list[Any] = []
    parallel = trainer.parallel
    by_owner: dict[Which, Any] = {"policy": trainer.chunks, "teacher": trainer.teacher.own.chunks}
    for whose, chunks in by_owner.items():
        out = Path(work) / whose
        with redirect_stdout(io.StringIO()) as said:
            back(str(newest), str(out), Options(verify=True), whose=whose, model=model, parallel=parallel)
        own = {
            name: one.detach().clone()
            for name, one in stream_hf_weights(chunks, trainer.shape, trainer.parallel)
        }
        found = weights(out)
        kinds = sorted({str(one.dtype) for one in found.values()})
        same({name: one.to(getattr(torch, dtype)) for name, one in found.items()}, own)
        if whose == "teacher":
            half = Options(dtype=torch.bfloat16)
            with redirect_stdout(io.StringIO()) as said_of_half:
                back(str(newest), f"{work}/half", half, whose=whose, model=model, parallel=parallel)
            rounds = "Note: the weights are float32: bfloat16 rounds each to 8 of its 24 significant bits."
            assert (
                rounds in said_of_half.getvalue()
                and "weights are other numbers now." in said_of_half.getvalue()
            )
        record = json.loads((out / "sdpo_megatron.json").read_text())
        result.append([kinds, record["steps"], said.getvalue().splitlines()[-1]])
    moved = [
        not torch.equal(one, other)
        for one, other in zip(weights(out).values(), weights(Path(model)).values(), strict=True)
    ]
    assert all(moved)
    return result


def refusals(calls: list[list[Any]]) -> list[str]:
    """What each conversion is refused with: direction, SRC, DST, and its options."""
    said = []
    for direction, src, dst, given in calls:
        more = dict(given)
        dtype = getattr(torch, more.pop("dtype")) if "dtype" in more else None
        options = Options(dtype=dtype, verify=more.pop("verify", False))
        try:
            (there if direction == "there" else back)(src, dst, options, **more)
            said.append("")
        except ReportedError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def command(argv: list[str]) -> list[Any]:
    """The exit code, and what is said on standard error."""
    with redirect_stderr(io.StringIO()) as said:
        code = main(argv)
    return [code, said.getvalue()]


def found_by_verifying(megatron: str, work: str) -> list[str]:
    """What verifying says of a disk that changes one bit, of a conversion that takes gate and up projection for each
    other, of a NaN that transformers alone has, and of one that both have."""

    def damaging(directory: Path, *arguments: Any, **options: Any) -> None:
        write_hf(directory, *arguments, **options)
        with (directory / "model.safetensors").open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)
            file.seek(-100, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))

    call = ["back", megatron, f"{work}/out", {"verify": True}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "write_hf", damaging)
        said = refusals([call])
    with pytest.MonkeyPatch.context() as patch:
        swapped = replace(ARRANGEMENTS[Rule.GATED], split=lambda joined, shape: list(joined.chunk(2))[::-1])
        patch.setitem(ARRANGEMENTS, Rule.GATED, swapped)
        said += refusals([call])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            verify, "_by_transformers", lambda path, ids, dtype: torch.full((len(ids), 1), torch.nan)
        )
        said += refusals([call])
        patch.setattr(verify, "_by_trainer", lambda *arguments: torch.full((1, 1), torch.nan))
        return said + refusals([call])


def put(model: str, targets: list[str], directory: str) -> list[str]:
    """What is said of each DST, of which one is where this process is."""
    here = Path(directory) / "here"
    here.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        return refusals([["there", model, target, {}] for target in targets])


def interrupted(argv: list[str], number: int) -> list[Any]:
    """As `command`, where a signal comes while a file is written."""

    def stopped(*arguments: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 1 vs 2")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist_writing.torch, "save", stopped)
        return command(argv)


def full_disk(model: str, megatron: str, work: str, room: int) -> list[str]:
    """What is said in each direction where a file may have `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        return refusals([["there", model, f"{work}/m", {}], ["back", megatron, f"{work}/hf", {}]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_room(model: str, out: str, free: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        usage = shutil.disk_usage(Path(out).parent)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        return refusals([["there", model, out, {}]])[0]


def peaks(work: str, changes: dict[str, int]) -> list[float]:
    """Peak resident memory of this process in each direction, in MB above what it had before, and the model's size."""
    source = make_large_model(Path(work) / "large", **changes)
    found = []
    lone()
    for run in (lambda: there(str(source), f"{work}/m"), lambda: back(f"{work}/m", f"{work}/hf")):
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        run()
        found.append(_memory("VmHWM") - before)
    size = (source / "model.safetensors").stat().st_size
    # headers say the same in other words
    assert abs((Path(work) / "hf" / "model.safetensors").stat().st_size - size) < 10_000
    return [*found, size / 1e6]


def _memory(key: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def killed(model: str, megatron: str, work: str, direction: str, moments: int) -> list[str]:
    """How each of so many conversions was found after it was killed, at moments drawn by seed 0 out of all calls that
    an undisturbed one makes; at the end one that is not killed."""
    target = Path(work) / "out"

    def run() -> None:
        if direction == "there":
            there(model, str(target), tp=3, pp=2)
        else:
            back(megatron, str(target))

    calls = _in_a_child(run, None, Path(work) / "calls")
    shutil.rmtree(target)
    dice = random.Random(0)
    found = []
    for moment in sorted(dice.randrange(calls) for _ in range(moments)):
        _in_a_child(run, moment, Path(work) / "calls")
        found.append(_state(target, direction))
        shutil.rmtree(target, ignore_errors=True)
    assert _in_a_child(run, None, Path(work) / "calls")
    assert sorted(path.name for path in Path(work).iterdir()) == ["calls", "out"]
    found.append(_state(target, direction))
    return found


def _in_a_child(run: Callable[[], None], kill_at: int | None, counted: Path) -> int:
    """Runs it in a child, which is killed at the call `kill_at` after its work began; how many calls there were."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if kill_at is None:
            assert os.waitstatus_to_exitcode(status) == 0
            return int(counted.read_text())
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        return kill_at
    count = -1

    def on_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event not in ("call", "c_call"):
            return
        if count < 0 and frame.f_code.co_name != "unfinished":
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        with redirect_stdout(io.StringIO()):
            sys.setprofile(on_call)
            run()
            sys.setprofile(None)
        counted.write_text(str(count))
        status = 0
    finally:
        os._exit(status)


def _state(target: Path, direction: str) -> str:
    """`nothing` or `whole`; and what a killed process left beside it cannot be loaded, or is whole too."""
    for left in [*target.parent.glob(".*"), target]:
        if not left.is_dir():
            continue
        try:
            if direction == "there":
                reader = DistReader(left)
                for key in reader.keys():
                    reader.read(key, [0] * len(reader.sizes_of(key)), reader.sizes_of(key))
            else:
                check_weights(left, read_model_shape(left))
        except UserError:
            assert left != target
    if not target.exists():
        return "nothing"
    assert is_converted(target)
    return "whole"
