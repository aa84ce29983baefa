"""Says whether a partition is fit to train, and what to do about what is not.

    python slurm/doctor.py [EXPERIMENT.yaml] [yaml/hardware/CLUSTER.yaml] [section.key=value ...] [--json]

A job of at most five minutes looks at one node, or at two nodes and at what lies between them, with the options of the
hardware. With an experiment its server.python, run.dir and limits are looked at instead of the defaults. Its files lie
below run.dir, or where --dir says, until it has ended.
"""

import secrets
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdpo_megatron.cluster.hardware import HardwareSettings, is_hardware, load_hardware
from sdpo_megatron.doctor.checks import Subject, subject_of
from sdpo_megatron.doctor.findings import Finding, table, to_json
from sdpo_megatron.doctor.several import differences, merged
from sdpo_megatron.errors import EXIT_FAILED, ConfigError, UserError
from sdpo_megatron.files import expand_user
from sdpo_megatron.preflight.checked import Parser
from sdpo_megatron.submission.examination import NODE, Examination
from sdpo_megatron.submission.examined import write_report
from sdpo_megatron.terminal import Screen, interruptible, tell

QUEUE_MINUTES = 30.0


@dataclass(frozen=True)
class Request:
    hardware: HardwareSettings
    subject: Subject
    directory: Path
    queue_limit_s: float
    as_json: bool


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 where nothing fails, 1 where something does, 2 for wrong arguments."""
    code = interruptible(lambda: examine_partition(parse(argv)))
    if code == 128 + signal.SIGINT:
        tell("The job is cancelled.", sys.stderr)
    return code


def parse(argv: Sequence[str]) -> Request:
    """Raises ConfigError."""
    what, usage, more = (__doc__ or "").strip().split("\n\n")
    parser = Parser(usage=usage.strip(), description=what, epilog=more, allow_abbrev=False)
    parser.add_argument("settings", nargs="*", metavar="FILE.yaml | section.key=value")
    parser.add_argument("--json", action="store_true", help="print the findings of each node as a list")
    parser.add_argument("--dir", help="a directory that the nodes see")
    parser.add_argument(
        "--wait", type=float, default=QUEUE_MINUTES, metavar="MINUTES", help="at most, in the queue"
    )
    given = parser.parse_intermixed_args(argv)
    files = [setting for setting in given.settings if "=" not in setting]
    overrides = [setting for setting in given.settings if "=" in setting]
    experiments = [file for file in files if not is_hardware(file)]
    if len(experiments) > 1:
        raise ConfigError(
            f"{experiments[1]} is a second experiment; give one file of hardware and one experiment."
        )
    of_hardware = [override for override in overrides if override.startswith("hardware.")]
    hardware = load_hardware([file for file in files if is_hardware(file)], of_hardware)
    rest = [override for override in overrides if override not in of_hardware]
    if rest and not experiments:
        raise ConfigError(f"{rest[0]} belongs to an experiment: give its YAML file too.")
    subject = subject_of(experiments[0] if experiments else None, rest)
    subject = replace(subject, device="cuda" if hardware.gpus_per_node else "cpu")
    base = subject.run_directory if given.dir is None else expand_user(given.dir, "--dir")
    own = f"doctor-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return Request(hardware, subject, base.absolute() / own, given.wait * 60, given.json)


def examine_partition(request: Request) -> int:
    if shutil.which("sbatch") is None:
        raise UserError(
            "There is no sbatch on PATH: run this on a login node of the cluster. python -m sdpo_megatron.doctor says "
            "the same of one machine."
        )
    findings = look(request)
    findings += differences(findings)
    if any(finding.name != NODE for finding in findings):
        write_report(request.hardware.partition, findings)
    if request.as_json:
        tell(to_json(findings))
    else:
        Screen().print(table(merged(findings)), soft_wrap=False)
    return EXIT_FAILED if any(finding.status == "failure" for finding in findings) else 0


def look(request: Request) -> list[Finding]:
    """Returns what the nodes found. Of the job only the logs of nodes that did not answer stay."""
    examination = Examination(request.hardware, request.directory)
    try:
        with examination.submitted(request.subject) as number:
            tell(f"Submitted as job {number}; its files lie in {request.directory}.", sys.stderr)
            findings = examination.wait(request.queue_limit_s, lambda line: tell(line, sys.stderr))
    except OSError as error:
        raise UserError(
            f"{error.filename or request.directory} cannot be written ({error.strerror}); name another directory by "
            "--dir."
        ) from None
    except BaseException:
        shutil.rmtree(request.directory, ignore_errors=True)
        raise
    if not any(finding.name == NODE for finding in findings):
        shutil.rmtree(request.directory, ignore_errors=True)
    return findings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
