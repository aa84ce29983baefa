"""Says whether this machine is fit to train, and what to do about what is not.

    python -m sdpo_megatron.doctor [EXPERIMENT.yaml [section.key=value ...]] [--json]

With an experiment its server.python, run.dir, run.device and limits are looked at instead of the defaults. It takes at
most two minutes, starts nothing that stays and leaves no file.
"""

import sys
from collections.abc import Sequence

from sdpo_megatron.doctor.checks import checks_of, subject_of
from sdpo_megatron.doctor.examine import examine
from sdpo_megatron.doctor.findings import table, to_json
from sdpo_megatron.errors import EXIT_FAILED
from sdpo_megatron.preflight.boundary import reading
from sdpo_megatron.preflight.checked import Parser
from sdpo_megatron.terminal import Screen, interruptible, tell


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 where nothing fails, 1 where something does, 2 for wrong arguments."""
    return interruptible(lambda: _doctor(argv))


def _doctor(argv: Sequence[str]) -> int:
    what, usage, more = (__doc__ or "").strip().split("\n\n")
    parser = Parser(usage=usage.strip(), description=what, epilog=more, allow_abbrev=False)
    parser.add_argument("experiment", nargs="?", help="a YAML file, whose settings are looked at")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="over the file's")
    parser.add_argument("--json", action="store_true", help="print the findings as a list")
    arguments = parser.parse_intermixed_args(argv)
    with reading("the experiment"):
        subject = subject_of(arguments.experiment, arguments.overrides)
    tell("Looking at this machine; that takes up to two minutes.", sys.stderr)
    findings = examine(checks_of(subject))
    if arguments.json:
        tell(to_json(findings))
    else:
        Screen().print(table(findings), soft_wrap=False)
    return EXIT_FAILED if any(finding.status == "failure" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
