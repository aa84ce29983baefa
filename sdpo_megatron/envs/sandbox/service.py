"""A sandbox elsewhere: an HTTP service with the interface of SandboxFusion's /run_code."""

import base64
import json
import math
from typing import Any, ClassVar

import httpx

from sdpo_megatron.envs.sandbox.base import LimitName, Limits, Outcome, Program, SandboxFault

ANSWER_WITHIN_S = 60.0
"""Seconds that the service may take beyond the program's own time: its queue, and its start."""
LONGEST_MESSAGE = 200
# The service runs one file of Python: this one sets the limits that the service does not know, and becomes the program.
LAUNCHER = """
import json, os, resource, sys
argv, limits = json.loads({words!r})
for name, bounds in limits.items():
    resource.setrlimit(getattr(resource, name), bounds)
if argv[0] == "python":
    argv[0] = sys.executable
os.execvp(argv[0], argv)
"""


class Service:
    """Runs programs at a service. What they can reach there is the service's promise, not ours."""

    name: ClassVar[str] = "http"

    def __init__(self, url: str):
        """`url` is the service's address, without /run_code."""
        self.url, self.python = url.rstrip("/"), "python"

    def run(self, program: Program, limits: Limits) -> Outcome:
        """Runs the program. Raises SandboxFault where the service is not reached, or did not run it."""
        cpu_s = math.ceil(limits.cpu_s)
        rlimits = {
            "RLIMIT_CPU": [cpu_s, cpu_s + 1],
            "RLIMIT_AS": [limits.memory_bytes] * 2,
            "RLIMIT_FSIZE": [limits.file_bytes] * 2,
            "RLIMIT_CORE": [0, 0],
        }
        request = {
            "code": LAUNCHER.format(words=json.dumps([list(program.argv), rlimits])),
            "language": "python",
            "run_timeout": limits.wall_s,
            "memory_limit_MB": math.ceil(limits.memory_bytes / (1 << 20)),
            "stdin": program.stdin.decode(errors="surrogateescape"),
            "files": {name: base64.b64encode(content).decode() for name, content in program.files.items()},
        }
        try:
            # neither proxies nor passwords of the environment
            with httpx.Client(trust_env=False, timeout=limits.wall_s + ANSWER_WITHIN_S) as client:
                response = client.post(f"{self.url}/run_code", json=request)
            response.raise_for_status()
            return self._outcome(response.json(), limits)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise SandboxFault(f"{self.url}/run_code: {str(error) or type(error).__name__}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise SandboxFault(f"{self.url}/run_code answered without {error}") from error

    def _outcome(self, answer: dict[str, Any], limits: Limits) -> Outcome:
        result = answer["run_result"]
        if answer["status"] == "SandboxError" or result["status"] == "Error":
            message = str(answer.get("message") or result)[:LONGEST_MESSAGE]
            raise SandboxFault(f"{self.url} ran no program: {message}")
        out, err = ((result[stream] or "").encode(errors="replace") for stream in ("stdout", "stderr"))
        limit: LimitName | None = None
        if result["status"] == "TimeLimitExceeded":
            limit = "wall"
        elif max(len(out), len(err)) > limits.output_bytes:
            limit = "output"
        wall_s = float(result["execution_time"] or 0.0)
        return Outcome.of(result["return_code"], limit, out, err, wall_s, limits)
