"""Replays the demo's first two recorded steps through teacher, loss, optimizer and push, without a server.

    .venv/bin/python -m tests.replay.replaying [--loss KEY=VALUE ...] [--teacher ...] [--optimizer ...] [--layout ...]
        [--problems N] [--json FILE]

Settings are those of yaml/demo_cpu.yaml in one process; what is given is laid over them, a layout as `--layout dp=2`.
For each step it prints the plain numbers that a run's row holds, in full, and SHA-256 of what must not change: of every
per-token tensor that the step leaves, of all gradients as the optimizer takes them, and of all weights as a push sends
them. The file has a line for each parameter too. A tensor's hash covers type, shape and bytes.

Bits differ between processors, libraries and numbers of threads (here: one). Hashes are therefore compared between two
checkouts on one machine, with nothing else but the code changed:

    (cd BEFORE && .venv/bin/python -m tests.replay.replaying --loss alpha=0.5 --json ../before.json)
    (cd AFTER && .venv/bin/python -m tests.replay.replaying --loss alpha=0.5 --json ../after.json)
    diff before.json after.json

No output of `diff` means that no bit has changed; what it prints are the first lines to look at, in the order of the
step. The same checkout gives the same file every time. With `--layout pp=2`, the demo's own, the numbers of the
recorded run itself come out, on its processor (Intel Xeon with AVX-512) to the last digit. `test_replay.py` compares
plain numbers with stored ones.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.records import Sample
from tests.ranks import run_ranks
from tests.replay import recording

DEMO = Path(__file__).parents[2] / "yaml" / "demo_cpu.yaml"
BASE = ["parallel.tp=1", "parallel.pp=1", "parallel.dp=1", "server.urls=[http://127.0.0.1:1]"]
"""One process; and an address that is never used, so that nobody misses the server's environment."""
SECTIONS = {"loss": "loss", "teacher": "teacher", "optimizer": "optimizer", "layout": "parallel"}
"""Options, and the sections of the settings that they are about."""
LONGEST_S = 3600.0

Hashes = dict[str, str]


def replay(overrides: list[str], problems: int | None = None, ranks: int = 1) -> dict[str, Any]:
    """Both steps in new processes, `ranks` of them. `overrides` are settings as on the command line of a run
    ("loss.alpha=0.5"), `problems` how many of each step's problems are taken: its first ones, or all.

    {"settings": ..., "problems": ..., "steps": one `replay_step` each}.
    """
    results = run_ranks(
        ranks, "tests.replay.replaying:replay_on_rank", overrides, problems, timeout_s=LONGEST_S
    )
    return {"settings": overrides, "problems": problems, "steps": results[0]}


def replay_on_rank(overrides: list[str], problems: int | None) -> list[dict[str, Any]]:
    """On each rank of the layout, which all return the same."""
    from sdpo_megatron.build import learning_of, trainer_of
    from sdpo_megatron.preflight.checked import preflight
    from sdpo_megatron.trainer.parallel import initialize

    torch.set_num_threads(1)
    # a run directory that is looked for, not made
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = [str(DEMO), f"run.dir={nowhere}", *BASE, *overrides]
        checked = preflight(arguments, world_size=int(os.environ["WORLD_SIZE"]))
    config = checked.config
    parallel = initialize(config.parallel, device=torch.device("cpu"), seed=config.run.seed)
    trainer = trainer_of(checked, learning_of(checked), parallel)
    responses = None if problems is None else problems * config.rollout.group_size
    return [replay_step(trainer, step, samples[:responses]) for step, samples in enumerate(recording.read())]


def replay_step(trainer: Any, step: int, samples: list[Sample]) -> dict[str, Any]:
    """One step as `train.train` and `run.Run` take it, and what it leaves:

    `numbers`: what a run's row says about learning; `tokens`: hashes of the flat per-token tensors; `gradients`: for
    each optimizer step, `pushed`: once, the hashes of all parameters by Hugging Face name, and under `all` of them
    together.
    """
    from sdpo_megatron.trainer.plan import token_weights
    from sdpo_megatron.trainer.ragged import Ragged
    from tests.gathered import flat

    teacher, learner, gradients = trainer.teacher, trainer.learner, keep_gradients(trainer)
    batch = learner.begin(samples)
    for mini_batch in batch.mini_batches:
        teaching = None if teacher is None else teacher.teach(mini_batch.own_samples, batch.ragged)
        learner.learn(batch, mini_batch, teaching, step)
        if teacher is not None:
            teacher.update_after("optimizer_step")
    if teacher is not None:
        teacher.update_after("batch")
    metrics = learner.metrics(batch)
    ragged = Ragged([len(sample.response_ids_T) for sample in samples])
    taught_B, of_terms_B = token_weights(samples, ragged, [term.loss for term in learner.terms])
    tokens = flat(batch, trainer.parallel, samples)
    tokens |= {"weights": torch.stack(of_terms_B).amax(0), "taught": taught_B}
    return {
        "numbers": metrics,
        "tokens": hashes(tokens.items()),
        "gradients": gradients,
        "pushed": of_all_stages(hashes(pushed(trainer)), trainer),
    }


def pushed(trainer: Any) -> Iterable[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of this stage, as the weights' stream to the servers has them."""
    from sdpo_megatron.trainer.hf_weights import stream_hf_weights

    return stream_hf_weights(trainer.policy, trainer.shape, trainer.parallel)


def keep_gradients(trainer: Any) -> list[Hashes]:
    """A list to which every optimizer step from now on adds the hashes of the gradients that it is given."""
    from tests.distributed.learning import gradients

    kept: list[Hashes] = []
    optimizer = trainer.learner.optimizer
    step = type(optimizer).step

    def stepping() -> Any:
        named = gradients(trainer.policy, trainer.shape, trainer.parallel)
        kept.append(of_all_stages(hashes(named.items()), trainer))
        del named
        return step(optimizer)

    optimizer.step = stepping
    return kept


def of_all_stages(own: Hashes, trainer: Any) -> Hashes:
    """By name, and under `all` one hash of names and hashes, whichever stage has which."""
    found: Hashes = {}
    for of_rank in trainer.parallel.gather(own if trainer.parallel.leads_stage else {}):
        found |= of_rank
    lines = [f"{name} {value}\n" for name, value in sorted(found.items())]
    return {"all": hashlib.sha256("".join(lines).encode()).hexdigest()} | found


def hashes(tensors: Iterable[tuple[str, Tensor]]) -> Hashes:
    """SHA-256 of each tensor's type, shape and bytes."""
    found: Hashes = {}
    for name, tensor in tensors:
        value = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        value.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        found[name] = value.hexdigest()
    return found


def show(steps: list[Mapping[str, Any]]) -> None:
    for step, left in enumerate(steps):
        print(f"step {step}")
        for name, number in left["numbers"].items():
            print(f"    {name:28} {number!r}")
        for name, value in left["tokens"].items():
            print(f"    {name:28} {value}")
        for i, by_name in enumerate(left["gradients"]):
            print(f"    {f'gradients, update {i}':28} {by_name['all']}")
        print(f"    {'pushed weights':28} {left['pushed']['all']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.replay.replaying")
    for option, section in SECTIONS.items():
        parser.add_argument(
            f"--{option}", nargs="+", default=[], metavar="KEY=VALUE", help=f"settings of `{section}`"
        )
    parser.add_argument("--problems", type=int, help="only so many of each step's problems")
    parser.add_argument("--json", type=Path, help="where to write everything, every parameter's hash too")
    given = vars(parser.parse_args())
    overrides = [f"{section}.{pair}" for option, section in SECTIONS.items() for pair in given[option]]
    layout = dict(pair.split("=") for pair in given["layout"])
    ranks = int(layout.get("tp", 1)) * int(layout.get("pp", 1)) * int(layout.get("dp", 1))
    replayed = replay(overrides, given["problems"], ranks)
    show(replayed["steps"])
    if given["json"] is not None:
        given["json"].write_text(json.dumps(replayed, indent=1) + "\n")


if __name__ == "__main__":
    main()
