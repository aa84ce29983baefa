"""Slurm's commands on this machine."""

import shutil
from collections.abc import Mapping

from sdpo_megatron.doctor.asking import ask
from sdpo_megatron.doctor.findings import Finding, failure, ok, warning

NAME = "Slurm"
COMMANDS = ("sbatch", "srun", "sinfo", "scontrol")
ASK_LIMIT_S = 8.0


def slurm_commands(environment: Mapping[str, str]) -> list[Finding]:
    there = [command for command in COMMANDS if shutil.which(command, path=environment.get("PATH"))]
    missing = [command for command in COMMANDS if command not in there]
    todo = "load Slurm's module, or put its programs on PATH"
    if (job := environment.get("SLURM_JOB_ID")) and "scontrol" in missing:
        todo += ", on the nodes too: a job requeues itself by scontrol"
        return [failure(NAME, f"this is job {job}, but scontrol is not on PATH", todo)]
    if not there:
        return [ok(NAME, "not here: fine without Slurm")]
    if missing:
        return [warning(NAME, f"{', '.join(there)} on PATH, but not {', '.join(missing)}", todo)]
    answer = ask(["scontrol", "ping"], ASK_LIMIT_S, environment)
    if answer.exit_code != 0:
        why = answer.last_error or f"no answer within {ASK_LIMIT_S:g} s"
        todo = "ask who runs the cluster; try again later"
        return [warning(NAME, f"the controller does not answer: {why}", todo)]
    return [ok(NAME, f"{', '.join(there)} on PATH; {', '.join(answer.output.strip().splitlines())}")]
