"""SDPO training (arXiv 2601.20802). The loop below is the algorithm; every rank runs it, rank 0 has the lists.

    python -m sdpo_megatron.train yaml/demo_cpu.yaml key.sub=value ...

One step, and the file of each part:

    1 rollout    G responses per problem from the current policy                rollout/sampler.py
    2 grade      reward and feedback of each response, begun when it arrives    envs/grading/step.py
    3 reprompt   what the teacher reads: a sibling's solution, the feedback     algorithm/reprompt/
    4 teacher    hidden states of the same tokens under that prompt             trainer/teacher.py
    5 learn      the distance of teacher and student per token, one optimizer
                 step per mini-batch                                            trainer/step.py, kernels/
    6 push       new weights to the servers, which prove that they have them    serving/push.py

Around the steps: held-out problems (evaluation/in_training.py), and the newest checkpoint, from which a run is resumed
(trainer/checkpoint.py).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from sdpo_megatron.errors import TeacherRefused
from sdpo_megatron.stopping import Stopped
from sdpo_megatron.terminal import escape_what_cannot_be_shown

if TYPE_CHECKING:
    from sdpo_megatron.run import Run


def train(run: Run) -> bool:
    """Trains from the run's first step to its last, or until it is asked to stop; either way its state is saved.

    Returns whether the run is finished."""
    log = run.log
    try:
        with log.timed("push"):
            run.serving.push(version=run.first_step)
        for step in range(run.first_step, run.steps):
            with log.step(step):
                if step % run.eval_every == 0:
                    run.evaluate()
                with log.timed("rollout"):
                    grading = run.grading(step)
                    run.serving.collect(run.submit(step, grading))
                    run.serving.release_memory()
                with log.timed("grade"):
                    groups_P = run.grade(grading)
                with log.timed("reprompt"):
                    samples = run.samples(grading)
                with log.timed("pack"):
                    batch = run.batch(samples)
                for mini_batch in batch.mini_batches:
                    with log.timed("teacher"):
                        teaching = run.teach(batch, mini_batch)
                    with log.timed("learn"):
                        run.learn(step, batch, mini_batch, teaching)
                run.end_batch(step, batch)
                run.push(step)
                run.record(groups_P, batch)
            stopping = run.asked_to_stop()
            if stopping or (step + 1) % run.save_every == 0 or step + 1 == run.steps:
                run.save()
            if stopping:
                run.raise_failure()
                return False
        with log.step(run.steps):
            run.evaluate()
        run.finish()
        return True
    except Stopped:
        run.save()
        return False
    except TeacherRefused:
        run.save()
        raise


def main(argv: list[str]) -> int:
    """Runs one rank where the rank variables are set (torchrun, srun, the launcher), else the launcher. Returns the
    exit code."""
    escape_what_cannot_be_shown()
    try:
        if "RANK" not in os.environ:
            from sdpo_megatron.launch.launcher import launch

            return launch(argv)
        from sdpo_megatron.launch.rank import run_rank

        return run_rank(argv, train)
    # before anything was started that could be stopped in order
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
