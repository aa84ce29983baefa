import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.report import site, step_pages, write_report
from sdpo_megatron.report.scripts import page, script
from tests.synthetic_run import synthetic_run
from tests.tiny_model import make_tokenizer

HOSTILE = "</script><script>x()</script><!--\u2028\u2029\x1b[2J\u202e\x00\ud800 é \U0001f600"


def texts(step: int) -> list[list[str]]:
    return [[f"step {step} group {p} response {g}" for g in range(3)] for p in range(2)]


def data(path: Path) -> Any:
    """What a file of data hands to the page."""
    content = path.read_text(encoding="ascii")
    assert content.startswith("report(") and content.endswith(");\n")
    name, _, rest = content[len("report(") :].partition(",")
    assert json.loads(name)
    return json.loads(rest[: -len(");\n")])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic_run(tmp_path / "x", texts)


def test_a_script_of_data_holds_nothing_that_a_browser_could_take_for_code():
    written = script("train/000001/0000", [HOSTILE])
    assert written.isascii() and "<" not in written and written.count("\n") == 1
    assert json.loads(written.partition(",")[2][: -len(");\n")]) == [HOSTILE]


def test_the_page_is_one_file_that_may_load_nothing_from_elsewhere():
    written = page()
    assert "default-src 'none'" in written and "unsafe" not in written
    for attribute in ("http-equiv", "src=", "href="):
        for line in written.splitlines():
            assert attribute not in line or "http://" not in line and "https://" not in line
    assert written.count("<script>") == 1 and written.count("</script>") == 1


def test_everything_of_a_step_is_there(run: Path):
    index = write_report(run)
    assert index == run / "report/index.html"
    step = data(run / "report/train/000001/step.js")
    assert [(group["problem"], group["first"], group["count"]) for group in step["groups"]] == [
        ("p0", 0, 3),
        ("p1", 3, 3),
    ]
    named = [
        [flag for bit, flag in enumerate(step["flagNames"]) if bits >> bit & 1] for bits in step["flags"]
    ]
    assert named == [
        ["right", "no teacher", "per token"],
        ["wrong", "truncated", "teacher cut", "per token"],
        ["right", "teacher cut", "per token"],
        ["right", "no teacher"],
        ["wrong", "truncated", "teacher cut"],
        ["right", "teacher cut"],
    ]
    first, second = data(run / "report/train/000001/0000.js")
    assert [response["response"] for response in first["responses"]] == texts(1)[0]
    assert first["teacherPrompts"] == ["<|im_start|>user\nSolution of [7, 0]<|im_end|>"]
    assert [response["teacherPrompt"] for response in first["responses"]] == [None, 0, 0]
    assert [response["demonstration"] for response in second["responses"]] == [None, 3, 3]
    assert first["responses"][1]["columns"].keys() == {
        "student",
        "teacher",
        "server",
        "advantage",
        "divergence",
    }
    assert "columns" not in second["responses"][0]


def test_the_trends_the_warnings_and_where_a_problem_was_asked(run: Path):
    write_report(run)
    summary = json.loads((run / "report/report.json").read_text())
    assert summary == data(run / "report/summary.js")
    assert [chart["title"] for chart in summary["charts"]] == [
        "Reward",
        "Held-out accuracy",
        "Divergence, student and teacher",
        "Entropy",
        "Response length",
        "Gradient norm",
        "Gap of server and trainer",
        "Time of a step",
        "Memory",
    ]
    assert summary["steps"] == [0, 1, 2, 3] and summary["state"] == "complete: 3 steps"
    assert summary["columns"]["test/avg@1"] == [0.25, None, None, 0.75]
    assert summary["warnings"] == [[1, "low_entropy"]]
    assert [step for step, _, _ in summary["splits"]["train"]] == [0, 1, 2]
    problems = dict(data(run / "report/problems.js"))
    assert problems["train p1"] == [["train", 0, 1, 2], ["train", 1, 1, 2], ["train", 2, 1, 2]]
    assert problems["eval p0"][0] == ["eval", 0, 0, 2]


def test_only_steps_that_are_new_or_changed_are_written(run: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[str] = []
    write_step = site.write_step

    def counted(record: Path, out: Path, name: str, task: Any) -> Any:
        written.append(name)
        return write_step(record, out, name, task)

    monkeypatch.setattr(site, "write_step", counted)
    later = run / "rollouts/train/000002.jsonl"
    later.rename(run / "later")
    write_report(run)
    assert written == ["train/000000", "train/000001", "eval/000000"]
    (run / "later").rename(later)
    write_report(run)
    assert written[3:] == ["train/000002"]
    (run / "report/train/000001/done.json").write_text("{")  # the writer was killed
    with (run / "rollouts/train/000000.jsonl").open("a") as file:
        file.write("\n")
    write_report(run)
    assert written[4:] == ["train/000000", "train/000001"]
    monkeypatch.setattr(step_pages, "VERSION", 2)
    write_report(run)
    assert len(written) == 10


def test_a_record_that_is_replaced_while_it_is_read_is_written_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that goes on makes a step again while somebody makes its report."""
    record, read = run / "rollouts/train/000000.jsonl", step_pages.read_record
    new = record.read_text().replace("step 0 group", "new group")

    def replaced(path: Path) -> list[Any]:
        found = read(path)
        if path == record:
            record.write_text(new)
        return found

    monkeypatch.setattr(step_pages, "read_record", replaced)
    write_report(run)
    monkeypatch.undo()
    write_report(run)
    first, _ = data(run / "report/train/000000/0000.js")
    assert first["responses"][0]["response"] == "new group 0 response 0"


def test_token_texts_come_with_the_tokenizer(run: Path):
    """A report that was made where the model is not gets its tokens once it is made where it is."""
    write_report(run)
    notes = json.loads((run / "report/report.json").read_text())["notes"]
    assert len(notes) == 1 and notes[0].startswith(
        "Responses are shown without the colours of their tokens: "
    )
    assert "texts" not in data(run / "report/train/000000/0000.js")[0]["responses"][0]
    make_tokenizer().save_pretrained(run / "model")
    config = json.loads((run / "config.json").read_text())
    config["values"]["model"]["path"] = str(run / "model")
    (run / "config.json").write_text(json.dumps(config))
    write_report(run)
    assert json.loads((run / "report/report.json").read_text())["notes"] == []
    response = data(run / "report/train/000000/0000.js")[0]["responses"][0]
    assert len(response["texts"]) == response["tokens"] == len(response["response"])


def test_a_run_that_crashed_or_lost_files_says_so_in_its_page(run: Path):
    (run / "config.json").write_text('{"values": {"run"')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "env/a')
    (run / "rollouts/train/000001.npz").unlink()
    cut = run / "rollouts/train/000002.jsonl"
    cut.write_bytes(cut.read_bytes()[:-40])
    (run / "endings").mkdir()
    (run / "endings/rank_0.json").write_text(
        json.dumps({"exit_code": 1, "message": "error: the server is lost"})
    )
    write_report(run)
    summary = json.loads((run / "report/report.json").read_text())
    assert summary["steps"] == [0, 1, 2, 3]
    assert summary["state"] == "3 steps; it ended: error: the server is lost"
    notes = " ".join(summary["notes"])
    assert "config.json is damaged" in notes
    assert "000001.npz is missing" in notes and "000002.jsonl is cut short, damaged" in notes
    assert [error is None for _, _, error in summary["splits"]["train"]] == [True, False, False]
    assert "is cut short" in data(run / "report/train/000002/step.js")["error"]
    (run / "config.json").unlink()
    (run / "metrics.jsonl").unlink()
    write_report(run)
    notes = " ".join(json.loads((run / "report/report.json").read_text())["notes"])
    assert "config.json is missing" in notes and "metrics.jsonl is missing" in notes


def test_an_environment_renders_its_own_and_may_fail_or_be_missing(tmp_path: Path):
    def calls(step: int) -> list[list[str]]:
        return [['Action: find\nAction Input: {"a": [1, 2]}', "Action: find\nAction Input: nothing"]]

    run = synthetic_run(tmp_path / "calls", calls, steps=1, env="tool_call")
    write_report(run)
    right, wrong = data(run / "report/train/000000/0000.js")[0]["responses"]
    assert right["parts"][0] == ["json", "Call of find", '{\n  "a": [\n    1,\n    2\n  ]\n}']
    assert right["parts"][1] == ["text", "Answer", calls(0)[0][0]]
    assert wrong["parts"][0][:2] == ["text", "Calls that cannot be read"]

    def program(step: int) -> list[list[str]]:
        return [["So:\n```python\nprint(1)\n```", "```python\nprint(2)\n```"]]

    run = synthetic_run(tmp_path / "programs", program, steps=1, env="python_tests", feedback="Wrong Answer")
    write_report(run)
    right, wrong = data(run / "report/train/000000/0000.js")[0]["responses"]
    assert [part[:2] for part in right["parts"]] == [["code", "Program"], ["text", "Answer"]]
    assert right["parts"][0][2] == "print(1)\n"
    assert wrong["parts"][1] == ["code", "Failed tests", "Wrong Answer"]

    run = synthetic_run(tmp_path / "own", texts, steps=1, env="tests.unit.report.test_report:Broken")
    write_report(run)
    response = data(run / "report/train/000000/0000.js")[0]["responses"][0]
    assert "parts" not in response
    assert response["note"] == "The environment cannot render this response: RuntimeError: no"

    run = synthetic_run(tmp_path / "gone", texts, steps=1, env="no_such_module:Env")
    write_report(run)
    assert any("shown as plain text: task.env=no_such_module:Env" in note for note in notes_of(run))


def notes_of(run: Path) -> list[str]:
    return json.loads((run / "report/report.json").read_text())["notes"]


def _broken() -> Any:
    from sdpo_megatron.envs.base import Environment
    from sdpo_megatron.strict_yaml.section import Section

    class Broken(Environment):
        Options = Section

        def train_problems(self) -> list[Any]:
            return []

        def grade(self, problem: Any, rollout: Any) -> Any: ...

        @classmethod
        def render(cls, response: Any) -> list[Any]:
            raise RuntimeError("no")

    return Broken


Broken = _broken()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: None, "{path} does not exist; name a run directory, such as runs/demo_cpu."),
        (lambda path: path.write_text(""), "{path} is a file; name a run directory, such as runs/demo_cpu."),
        (
            lambda path: path.mkdir(),
            "{path} is no run directory: it has no config.json, no metrics.jsonl and no rollouts/; name one, such as "
            "runs/demo_cpu.",
        ),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path: Path, make: Any, line: str):
    path = tmp_path / "x"
    make(path)
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_megatron.report", str(path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {line.format(path=path)}\n"
    assert not (path / "report").exists() if path.is_dir() else True


def test_the_command_says_where_the_page_is(run: Path, tmp_path: Path):
    out = tmp_path / "else where"
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_megatron.report", str(run), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Report: {out}/index.html\n{(out / 'index.html').as_uri()}\n"
    assert not (run / "report").exists()


def test_a_folder_that_cannot_be_written_is_one_line(run: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        write_report(run, tmp_path / "file")
    assert str(caught.value) == (
        f"The report {tmp_path}/file cannot be written: File exists; name another folder with --out."
    )


def test_records_that_cannot_be_shown_are_a_note_and_responses_without_a_teacher_have_no_divergence(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    read = step_pages.read_record

    def without_feedback(path: Path) -> list[Any]:
        return (
            [dataclasses.replace(one, feedback=None) for one in read(path)]
            if path.stem == "000002"
            else read(path)
        )

    monkeypatch.setattr(step_pages, "read_record", without_feedback)
    write_report(run)
    assert "cannot be shown (TypeError" in data(run / "report/train/000002/step.js")["error"]
    step = data(run / "report/train/000001/step.js")
    assert step["error"] is None and step["divergence"][0] is None and step["divergence"][1] is not None


def test_the_right_answer_is_there(run: Path):
    write_report(run)
    first, _ = data(run / "report/train/000001/0000.js")
    assert {response["answer"] for response in first["responses"]} == {""}
