"""`tools/check_gpu.py` on a CPU: every part runs, a broken kernel shows, what is missing is named, time is kept."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools import check_gpu
from tools.gpu_check import environment, recording, table, wheels
from tools.gpu_check.environment import Ended
from tools.gpu_check.machine import attempt

ROOT = Path(__file__).parents[2]


def run(*arguments: str, root: Path = ROOT, report: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON, and what was printed."""
    done = subprocess.run(
        [
            sys.executable,
            str(root / "tools/check_gpu.py"),
            "--device",
            "cpu",
            "--json",
            str(report),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert report.exists(), done.stderr
    return done.returncode, json.loads(report.read_text()), done.stdout


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    return run("--minutes", "4", report=tmp_path_factory.mktemp("check") / "report.json")


def test_every_part_runs(everything):
    code, report, printed = everything
    assert {part["name"]: (part["status"], part["reason"]) for part in report["parts"]} == {
        name: ("passed", "") for name in check_gpu.PARTS
    }
    assert code == 0 and sum(part["seconds"] for part in report["parts"]) < 240
    assert all(f"{name}: passed" in printed for name in check_gpu.PARTS)


def test_the_report_says_what_ran_where(everything):
    _, report, _ = everything
    assert "no figure says anything about a GPU" in report["machine"]["device"]
    assert report["versions"]["torch"] and report["versions"]["megatron-core"] == "0.16.1"
    assert len(report["commit"].removesuffix("+changes")) == 40 and len(report["source"]) == 64


def test_every_objective_is_examined_in_both_types(everything):
    _, report, _ = everything
    examined = {tuple(row["what"].split(", ")[:-2]) for row in report["parts"][0]["rows"]}
    assert len(examined) == 6
    for objective in examined:
        for dtype in ("bfloat16", "float32"):
            assert any(
                row["what"].startswith(", ".join((*objective, dtype))) for row in report["parts"][0]["rows"]
            )


def test_gradients_are_those_that_were_recorded(everything):
    """Another loss, another model or another order of weights needs another recording: --record makes it."""
    _, report, _ = everything
    row = next(part for part in report["parts"] if part["name"] == "training")["rows"][0]
    assert row["what"].startswith("gradients, tiny-shaped, float32") and row["worst tensor"] < 1e-3
    assert row["loss error"] < 1e-5 and row["student error"] < 1e-4


def test_a_broken_kernel_is_found(tmp_path):
    """Two terms: nats for bits in a sum, and the target's entry in a gradient."""
    for folder in ("sdpo_megatron", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, term, broken in (
        ("divergence_triton.py", "kl * _LN2", "kl"),
        ("softmax_triton.py", "tl.where(column == y, d + hot, d)", "tl.where(column == y, d, d)"),
    ):
        path = tmp_path / "sdpo_megatron/kernels" / name
        source = path.read_text()
        assert source.count(term) == 1
        path.write_text(source.replace(term, broken))
    code, report, printed = run("--parts", "correctness", root=tmp_path, report=tmp_path / "report.json")
    rows = {row["what"]: row for row in report["parts"][0]["rows"]}
    assert code == 1 and report["parts"][0]["status"] == "failed" and "correctness: failed" in printed
    assert report["commit"] == "unknown"
    assert rows["token level, float32, real"]["gradient error/bound"] > 1
    assert rows["token level, float32, real"]["logprob error/bound"] < 1
    assert rows["reverse KL, float32, real"]["divergence error/bound"] > 1
    assert rows["JSD 0.3, float32, real"]["ok"]


@pytest.fixture
def here(tmp_path: Path) -> environment.Environment:
    return environment.Environment("cpu", ROOT, tmp_path / "site", tmp_path, {"device": "x"})


def ended(
    monkeypatch: pytest.MonkeyPatch, here: environment.Environment, result: Ended, **missing: Any
) -> Any:
    monkeypatch.setattr(environment.Environment, "run", lambda *_, **__: result)
    part = check_gpu.Part("training")
    check_gpu.run_part(part, here, missing.get("seconds", 60.0))
    return part.status, part.reason


def test_what_a_part_came_to(monkeypatch, here):
    good, bad = {"what": "a", "ok": True}, {"what": "b", "ok": False}
    cases = [
        (Ended(0, 1.0, [good]), ("passed", "")),
        (Ended(0, 1.0, [good, bad]), ("failed", "1 of 2, first: b")),
        (Ended(None, 9.0, [good]), ("stopped", "after 9 s; the rows so far count")),
        (Ended(None, 9.0, [bad]), ("failed", "1 of 1, first: b")),
        (Ended(-11, 1.0, [good], "RuntimeError: x"), ("failed", "RuntimeError: x")),
    ]
    for result, expected in cases:
        assert ended(monkeypatch, here, result) == expected
    assert ended(monkeypatch, here, cases[0][0], seconds=1.0) == ("not reached", "the time was over")


def test_what_is_missing_is_named(monkeypatch, here):
    monkeypatch.setitem(environment.NEEDS, "training", ("megatron.core", "no_such_module"))
    status, reason = ended(monkeypatch, here, Ended(0, 1.0))
    assert (status, reason) == ("skipped", "no_such_module: install, or give --wheels")
    monkeypatch.setitem(environment.NEEDS, "training", ("no_such_package.core",))
    assert environment.missing("training") == ["no_such_package.core"]


def test_a_part_that_hangs_is_stopped_with_its_rows(here, monkeypatch):
    """Each row is there as soon as it is made."""
    monkeypatch.setattr(environment.subprocess, "Popen", popen := slow_part(here.directory))
    start = time.monotonic()
    result = here.run("kernels", timeout_s=5)
    assert result.code is None and result.rows == [{"what": "made"}] and popen.started
    assert time.monotonic() - start < 20


class slow_part:
    """Starts, in the place of a part, a process that makes one row, half of another, and then hangs."""

    def __init__(self, directory: Path):
        self.started, self.rows, self.plain = False, directory / "kernels.jsonl", subprocess.Popen

    def __call__(self, command: list[str], **options: Any) -> subprocess.Popen:
        self.started = True
        code = f'open({str(self.rows)!r}, \'w\').write(\'{{"what": "made"}}\\n{{"wh\'); import time; time.sleep(60)'
        return self.plain([sys.executable, "-c", code.replace("; import", ";\nimport")], **options)


def test_one_failure_does_not_end_a_part():
    def fails() -> dict[str, Any]:
        raise ValueError("two\nlines")

    assert list(attempt("x", fails)) == [{"what": "x", "ok": False, "failed": "ValueError: two lines"}]


def test_rows_of_other_figures_begin_a_new_block():
    rows = [{"what": "a", "ms": 1.0}, {"what": "b", "skipped": "why"}, {"what": "c", "s": 2.0, "ok": False}]
    assert table.table("x", "passed", "", 3.0, rows).splitlines() == [
        "",
        "== x: passed, 3 s",
        "",
        "what  ms  skipped",
        "a     1",
        "b         why",
        "",
        "what  s  ok",
        "c     2  NO",
    ]


def test_a_recording_notices_a_wrong_gradient():
    expected = {"loss": 2.0, "student": [0.0], "teacher": [0.0], "gradients": {"a": [1.0, 0.6, 0.8]}}
    assert recording.compare(expected, expected)["gradient error"] == 0
    wrong = recording.compare({**expected, "gradients": {"a": [1.0, 0.8, 0.6]}}, expected)
    assert (
        wrong["gradient error"] == pytest.approx(0.2 * 2**0.5)
        and wrong["worst tensor"] == wrong["gradient error"]
    )
    assert recording.compare({**expected, "gradients": {"a": [3.0, 0.6, 0.8]}}, expected)["worst tensor"] == 2
    with pytest.raises(AssertionError, match="--record"):
        recording.compare({**expected, "gradients": {}}, expected)


def test_mistakes_with_wheels_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="holds no wheels; make them with --collect-wheels"):
        wheels.install(tmp_path, tmp_path / "site")
    (tmp_path / "a.whl").write_text("")
    with pytest.raises(SystemExit, match="holds wheels already"):
        wheels.collect(tmp_path)


def test_wheels_are_in_the_versions_of_this_environment(tmp_path, monkeypatch):
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def download(command: list[str]) -> Done:
        commands.append(command)
        tmp_path.joinpath("a.whl").write_bytes(b"x" * 1000)
        return Done()

    monkeypatch.setattr(wheels.subprocess, "run", download)
    assert wheels.collect(tmp_path) == 0
    assert "megatron-core==0.16.1" in commands[0] and "--no-deps" in commands[0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--minutes", "0"], "error: --minutes is 0; it must be above 0"),
        (
            ["--device", "cuda", "--json", "{tmp}/x.json"],
            "error: no device for --device cuda: torch sees no GPU",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, line, tmp_path):
    words = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    done = subprocess.run(
        [sys.executable, "tools/check_gpu.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and done.stderr.strip().splitlines()[-1].endswith(line)
