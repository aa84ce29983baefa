"""Kills parts of jobs at random moments, and holds what each run comes to against one that nothing happens to.

    python -m tests.slurm.campaign --kills 40 --seed 0 [--dir campaign] [--seconds 500]

Each kill is of one run: the process that makes the attempt, a rank, the server, a node, or a node's link, in a phase of
a step, or right behind it where that lasts for a moment; kill number k of a seed is always the same. What was done is
in DIR/kills.jsonl, and another call goes on behind it; with --seconds nothing new begins after so long. The exit code
is 0 once all kills were done and all runs are whole.
Needs root, as tests.slurm.cluster.
"""

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster, ClusterError, what_is_missing
from tests.slurm.running import Submitted, as_on_a_login_node, job_settings
from tests.stand_in_server import stand_in_python
from tests.tiny_model import make_tiny_model

STEPS = 12
VICTIMS = ("attempt", "rank", "server", "node", "link")
SHARED_BY_OTHERS = ("node", "link")
"""Victims that are not one run's own."""
PHASES = ("start", "eval", "rollout", "grade", "teacher", "learn", "push", "checkpoint")
AT_ONCE = 3


@dataclass(frozen=True)
class Kill:
    number: int
    victim: str
    phase: str
    step: int
    rank: int
    """Of the rank, and that on the node, that is the victim."""


@dataclass
class Result:
    kill: Kill
    seconds: float
    wrong: str = ""
    """Empty where the run is whole."""
    attempts: list[dict[str, Any]] = field(default_factory=list)


def kill_of(seed: int, number: int) -> Kill:
    dice = random.Random(f"{seed} {number}")
    return Kill(
        number, dice.choice(VICTIMS), dice.choice(PHASES), dice.randrange(1, STEPS - 3), dice.randrange(2)
    )


def do(kill: Kill, submitted: Submitted) -> None:
    """Waits for the moment, and kills."""
    if kill.phase == "start":
        submitted.wait_for(lambda: submitted.processes("sdpo_megatron.job.rank"), "its ranks start")
        time.sleep(kill.step)
    else:
        submitted.wait_for_phase(kill.phase, kill.step, or_later=True)
    if kill.victim == "attempt":
        victims = submitted.processes("sdpo_megatron.job.run ")
    elif kill.victim == "server":
        victims = submitted.server() or submitted.processes("sdpo_megatron.job.server")
    else:
        victims = [submitted.rank(kill.rank)]
    if kill.victim in SHARED_BY_OTHERS:
        node = submitted.node_of(victims[0])
        (submitted.cluster.kill_node if kill.victim == "node" else submitted.cluster.cut)(node)
        return
    for victim in victims:
        victim.kill()


def whole(submitted: Submitted, undisturbed: list[dict[str, Any]]) -> str:
    """Returns what is wrong with a run that has ended; nothing is where that is empty."""
    if (state := submitted.state()) != "COMPLETED":
        return f"the job is {state}: {submitted.output()[-500:]}"
    steps = [row["step"] for row in submitted.rows()]
    if steps != list(range(STEPS + 1)):
        return f"its rows have the steps {steps}"
    if len(submitted.attempts()) < 2:
        return "nothing was lost: the kill came too late"
    values = submitted.values()
    different = [
        f"{key} of step {k}"
        for k, (row, expected) in enumerate(zip(values, undisturbed, strict=True))
        for key in row.keys() | expected.keys()
        if row.get(key) != expected.get(key)
    ]
    return f"values differ: {', '.join(sorted(different)[:5])}" if different else ""


class Campaign:
    def __init__(self, directory: Path, cluster: Cluster) -> None:
        self.cluster, self.log = cluster, directory / "kills.jsonl"
        shared = cluster.shared
        self.engines = (
            make_tiny_model(shared / "model"),
            stand_in_python(shared / "stand_in", "--repeatable", "--slow", "0.05"),
        )
        self.undisturbed: list[dict[str, Any]] = []

    def submit(self, name: str) -> Submitted:
        with redirect_stdout(io.StringIO()):
            return Submitted(
                self.cluster,
                self.cluster.shared,
                job_settings(self.engines, self.cluster.shared, name=name, steps=STEPS),
            )

    def measure(self) -> None:
        submitted = self.submit("undisturbed")
        submitted.end()
        self.undisturbed = submitted.values()

    def make(self, kills: Sequence[Kill]) -> None:
        """Does these kills at once, each to a run of its own, and notes what became of them."""
        runs = [self.submit(f"kill-{kill.number:03d}") for kill in kills]
        with ThreadPoolExecutor() as threads:
            results = list(threads.map(self._make, kills, runs))
        with self.log.open("a", encoding="utf-8") as file:
            for result in results:
                file.write(json.dumps(asdict(result)) + "\n")
        for result, run in zip(results, runs, strict=True):
            kill = result.kill
            what = f"{kill.number:3} {kill.victim:8} {kill.phase:10} step {kill.step}"
            whys = ", ".join(f"{attempt['why']} ({attempt['steps']})" for attempt in result.attempts)
            print(f"{what}: {result.wrong or 'whole'} after {result.seconds:.0f} s; {whys}", flush=True)
            if not result.wrong:
                shutil.rmtree(run.run)
        self.cluster.restore()

    def _make(self, kill: Kill, submitted: Submitted) -> Result:
        began = time.monotonic()
        try:
            do(kill, submitted)
            submitted.end(seconds=600)
            wrong = whole(submitted, self.undisturbed)
        except (AssertionError, ClusterError) as error:
            wrong = str(error)[-2000:] or "it did not come to its end"
        return Result(kill, time.monotonic() - began, wrong, submitted.attempts())


def done(log: Path) -> dict[int, str]:
    """Returns what was wrong, by kill; empty where the run is whole."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    results = [json.loads(line) for line in lines]
    return {result["kill"]["number"]: result["wrong"] for result in results}


def batches(kills: Sequence[Kill]) -> list[list[Kill]]:
    """Returns the kills, of which those whose victims are not shared are together."""
    alone = [[kill] for kill in kills if kill.victim in SHARED_BY_OTHERS]
    others = [kill for kill in kills if kill.victim not in SHARED_BY_OTHERS]
    return [*(others[at : at + AT_ONCE] for at in range(0, len(others), AT_ONCE)), *alone]


@contextmanager
def started_cluster():
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    cluster = Cluster(root)
    cluster.up(wait_s=600.0)
    try:
        with as_on_a_login_node(cluster):
            yield cluster
    finally:
        cluster.down()
        shutil.rmtree(root, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=Path("campaign"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args(arguments)
    if missing := what_is_missing():
        print(f"error: {missing}", file=sys.stderr)
        return 2
    asked.dir.mkdir(parents=True, exist_ok=True)
    log, began = asked.dir / "kills.jsonl", time.monotonic()
    kills = [kill_of(asked.seed, number) for number in range(asked.kills)]
    left = [kill for kill in kills if done(log).get(kill.number) != ""]
    if left:
        with started_cluster() as cluster, suppress(KeyboardInterrupt):
            campaign = Campaign(asked.dir, cluster)
            campaign.measure()
            for batch in batches(left):
                if time.monotonic() - began > asked.seconds:
                    break
                campaign.make(batch)
    results = done(log)
    whole_ones = Counter(kill.victim for kill in kills if results.get(kill.number) == "")
    asked_for = Counter(kill.victim for kill in kills)
    for victim in VICTIMS:
        print(f"{victim:8} {whole_ones[victim]:3} of {asked_for[victim]} whole")
    print(f"{whole_ones.total()} of {asked.kills} runs are whole.")
    return 0 if whole_ones.total() == asked.kills else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
