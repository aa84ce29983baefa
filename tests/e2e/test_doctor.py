"""The doctor on this machine, with both environments: it is fit, or these tests could not run either."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def test_this_machine_is_fit_and_is_left_as_it_was(tmp_path: Path):
    mark = "OF_THIS_TEST"
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        mark: str(os.getpid()),
    }
    settings = ["run.dir=runs", f"server.python={ROOT}/.venv-sglang/bin/python"]
    start = time.monotonic()
    doctor = subprocess.run(
        [sys.executable, "-m", "sdpo_megatron.doctor", f"{ROOT}/yaml/demo_cpu.yaml", *settings, "--json"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=150,
    )
    assert time.monotonic() - start < 120
    findings = {finding["name"]: finding for finding in json.loads(doctor.stdout)}
    assert doctor.returncode == 0, [f for f in findings.values() if f["status"] == "failure"]
    assert {"clock", "run directory: speed", "gloo ring", "sandbox"} <= findings.keys()
    assert findings["trainer environment"]["figures"].keys() >= {"torch", "megatron-core", "triton"}
    assert findings["server environment"]["figures"].keys() >= {"sglang", "torch", "transformers"}
    assert list(tmp_path.iterdir()) == []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            assert process.environ().get(mark) != str(os.getpid()), process.cmdline()
