"""Other people's files, what is counted and dropped, and that nothing half is written."""

import hashlib
import importlib.util
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from sdpo_megatron.data.prepare import Request, prepare
from sdpo_megatron.data.seen import normalised
from sdpo_megatron.data.sets.base import DataSet
from sdpo_megatron.envs.data.files import read_lines
from sdpo_megatron.envs.jsonl import JsonlOptions, JsonlProblems
from sdpo_megatron.errors import UserError
from tests.unit.data.published import lines, parquet, put, table

ROOT = Path(__file__).parents[3]
ROWS = [{"question": f"{n} + 1?", "target": str(n + 1), "level": "easy", "by": "x"} for n in range(40)]
FIELDS = {"prompt": "question", "answer": "target", "difficulty": "level"}


@pytest.fixture
def tool(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns exit code, output and errors."""
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "tools" / "prepare_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["prepare_data.py", *map(str, arguments)])
        code = module.main()
        return code, *capsys.readouterr()

    return run


def own(path: Path, out: Path, test: Path | None = None, **options) -> dict:
    files: dict = {"all": ("*",)} if test is None else {"train": (), "test": ()}
    found = DataSet(what="own", env="jsonl", files=files, split="")
    return prepare(Request(name="own", found=found, path=path, test=test, out=out, **options))


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("name", "made"), [("a.jsonl", lines), ("a.csv", table), ("a.parquet", parquet)])
def test_other_people_s_columns(name, made, tmp_path, tool):
    (tmp_path / name).write_bytes(made(ROWS))
    code, _, errors = tool(
        *(tmp_path / name, "--env", "jsonl", "--option", "grader=last_number", "--out", tmp_path / "out"),
        *("--fields", "prompt=question,answer=target,difficulty=level"),
    )
    assert code == 0, errors
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    options = JsonlOptions(**manifest["options"])
    assert options.grader == "last_number"
    env = JsonlProblems(options)
    problems = [*env.train_problems(), *env.test_problems()]
    assert {(p.messages[0]["content"], p.answer) for p in problems} == {
        (row["question"], row["target"]) for row in ROWS
    }
    assert all(p.metadata == {"difficulty": "easy"} for p in problems)
    assert 0 < len(env.test_problems()) < 15


def test_the_manifest(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS[:1] + [ROWS[0] | {"question": " 1+ 1? "}]))
    manifest = own(tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "b.jsonl", fields=FIELDS, command="me")
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"] == {"read": 42, "train": 40, "test": 2}
    for file in manifest["source"]["files"]:
        assert file["sha256"] == hashlib.sha256(Path(file["path"]).read_bytes()).hexdigest()
    for name, file in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest() and file["bytes"] == len(content)
        assert file["rows"] == content.count(b"\n")
    assert manifest["overlap"] == [
        {"of": "train", "and": "test", "exact": 1, "alike": 1, "examples": [["2", "1"], ["1", "2"]]}
    ] or manifest["overlap"] == [
        {"of": "train", "and": "test", "exact": 1, "alike": 1, "examples": [["1", "1"], ["2", "2"]]}
    ]
    assert manifest["command"] == "me"
    # the same again, byte for byte
    own(tmp_path / "a.jsonl", tmp_path / "again", tmp_path / "b.jsonl", fields=FIELDS, command="me")
    for name in manifest["files"]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_duplicates_are_dropped_and_counted_and_likenesses_counted(tmp_path):
    rows = [
        *ROWS,
        ROWS[3],
        ROWS[3] | {"level": "hard"},
        ROWS[4] | {"target": "-1"},
        ROWS[5] | {"question": "5  +\n1?"},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    manifest = own(tmp_path / "a.jsonl", tmp_path / "out", fields=FIELDS, share=0.0)
    assert manifest["counts"] == {
        "read": 44,
        "train": 41,
        "duplicates": 2,
        "duplicates with another answer": 1,
    }
    assert manifest["overlap"] == [{"of": "train", "and": "train", "alike": 1}]
    assert len(rows_in(tmp_path / "out/train.jsonl")) == 41


def test_what_is_alike_is_never_on_both_sides_of_a_seeded_share(tmp_path):
    rows = [row | {"question": row["question"].replace(" ", space)} for row in ROWS for space in ("", "  ")]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    manifest = own(tmp_path / "a.jsonl", tmp_path / "out", fields=FIELDS, share=0.5, seed=3)
    overlap = manifest["overlap"][0]
    assert (overlap["exact"], overlap["alike"]) == (0, 0) and 20 < manifest["counts"]["test"] < 60
    other = own(tmp_path / "a.jsonl", tmp_path / "other", fields=FIELDS, share=0.5, seed=4)
    assert other["files"]["test.jsonl"]["sha256"] != manifest["files"]["test.jsonl"]["sha256"]
    # further rows move none
    (tmp_path / "b.jsonl").write_bytes(lines([{**ROWS[0], "question": "new"}, *reversed(rows)]))
    own(tmp_path / "b.jsonl", tmp_path / "more", fields=FIELDS, share=0.5, seed=3)
    held = {row["prompt"] for row in rows_in(tmp_path / "out/test.jsonl")}
    assert held <= {row["prompt"] for row in rows_in(tmp_path / "more/test.jsonl")}


def test_against_another_prepared_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "b.jsonl").write_bytes(
        lines([{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "1 + 1 ?", "answer": "2"}])
    )
    against = (tmp_path / "b.jsonl",)
    manifest = own(tmp_path / "a.jsonl", tmp_path / "out", fields=FIELDS, share=0.0, against=against)
    assert [(o["and"], o["exact"], o["alike"]) for o in manifest["overlap"]] == [(str(against[0]), 1, 1)]


def test_normalised():
    assert normalised("Ｗhat  is\n½?") == normalised("what is 1⁄2?")
    assert normalised("x - 1") != normalised("x + 1")


def failing(tmp_path: Path, content: bytes, name: str = "a.jsonl", **options) -> str:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        own(tmp_path / name, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name], "something half is there"
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(tmp_path), "D")


def test_mistakes_in_one_line_and_nothing_half(tmp_path):
    good = lines([{"prompt": "x", "answer": "y"}])
    assert failing(tmp_path, good + b'{"prompt": "z"}\n').startswith(
        "D/a.jsonl line 2: 'answer' is missing; add it. The columns are prompt; --fields answer=... maps one."
    )
    assert failing(tmp_path, good, fields={"prompt": "q"}).startswith(
        "D/a.jsonl line 1: --fields reads prompt from 'q', but there is no such column."
    )
    assert failing(tmp_path, b"").startswith("own: the split leaves no problem to train on (0 read)")
    assert failing(tmp_path, good, share=0.0, against=(tmp_path / "none",)) == (
        "There is no problem file D/none: correct its path in the command."
    )
    few = lines([{"prompt": f"{n}", "answer": "y"} for n in range(2)])
    assert failing(tmp_path, few, share=0.001) == (
        "own: the split leaves no problem held out (2 read, 2 train); change --share."
    )
    twice = lines([{"id": "a", "prompt": f"{n}", "answer": "y"} for n in range(2)])
    assert failing(tmp_path, twice, share=0.0) == (
        "Two different problems of train have the id 'a'; give each its own, or map another column to id."
    )


def test_unreadable_rows_are_dropped_where_that_is_asked_for(tmp_path):
    rows = lines([{"prompt": "x", "answer": "y"}, {"prompt": "x"}, {"prompt": "z", "answer": "y"}])
    (tmp_path / "a.jsonl").write_bytes(rows)
    manifest = own(tmp_path / "a.jsonl", tmp_path / "out", share=0.0, leave_out_unreadable=True)
    assert manifest["counts"] == {"read": 3, "train": 2, "unreadable": 1}
    assert manifest["unreadable"][0].startswith(f"{tmp_path}/a.jsonl line 2: 'answer' is missing")


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with monkeypatch.context() as patch:

            def fail(*arguments, error=error):
                raise error

            patch.setattr("sdpo_megatron.data.prepare.write_atomically", fail)
            with pytest.raises((KeyboardInterrupt, UserError)) as caught:
                own(tmp_path / "a.jsonl", tmp_path / "out", fields=FIELDS)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert "cannot be written ([Errno 28] No space left" in str(caught.value)
    (tmp_path / "out").mkdir()
    own(tmp_path / "a.jsonl", tmp_path / "out", fields=FIELDS)
    with pytest.raises(UserError, match="is there already; remove it, or name another directory by --out"):
        own(tmp_path / "a.jsonl", tmp_path / "out", fields=FIELDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gsm9k"],
            "There is no set of problems 'gsm9k'. Did you mean 'gsm8k'? There are: aime24, aime25, deep",
        ),
        (["D/a.jsonl"], "D/a.jsonl is a path: say by --as of which set, or by --env for which environment."),
        (["D/a.jsonl", "--as", "math500"], "There is no set of problems 'math500'. Did you mean 'math-500'?"),
        (["D/no.jsonl", "--as", "math-500"], "There is no file D/no.jsonl: correct its path in the command."),
        (
            ["D/a.jsonl", "--as", "gsm8k"],
            "gsm8k has a file of held-out problems too: name it by --test, or give",
        ),
        (
            ["D", "--as", "humaneval"],
            "D has no data/HumanEval.jsonl.gz of humaneval; get it by: curl --create-dirs",
        ),
        (
            ["D/a.jsonl", "--as", "gsm8k", "--env", "jsonl"],
            "gsm8k has its own environment and fields; leave --env",
        ),
        (
            ["D/a.jsonl", "--env", "jsonll"],
            "There is no environment (task.env) 'jsonll'. Did you mean 'jsonl'?",
        ),
        (
            ["D/a.jsonl", "--env", "equations"],
            "--env equations makes its problems itself, and reads no files;",
        ),
        (
            ["D/a.jsonl", "--env", "jsonl", "--option", "greder=exact"],
            "Unknown key '--option.greder'. Did you mean '--option.grader'?",
        ),
        (
            ["D/a.jsonl", "--as", "math-500", "--share", "0.1"],
            "--share: math-500 is split by a rule of its own",
        ),
        (
            ["mbpp", "--split", "paper"],
            "--split paper: of mbpp there are these ways to split: none to choose.",
        ),
        (["mbpp", "--only", "test"], "--only test: the files of mbpp are not told apart so; leave it away."),
        (["gsm8k", "--test", "D/a.jsonl"], "--test is the file beside a PATH, and gsm8k is downloaded;"),
    ],
)
def test_mistakes_in_the_command(arguments, message, tmp_path, tool):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    code, _, errors = tool(
        *(a.replace("D", str(tmp_path), 1) if a[0] == "D" else a for a in arguments), "--out", tmp_path / "o"
    )
    assert code == 2 and errors.count("\n") == 1, errors
    assert errors.replace(str(tmp_path), "D").startswith(f"error: {message}"), errors
    assert not (tmp_path / "o").exists()


def test_options_that_are_no_text(tmp_path, tool):
    (tmp_path / "a.jsonl").write_bytes(lines([{"question": f"{n}?", "answer": "1"} for n in range(2)]))
    options = ("--option", "require_box=false,instruction=Answer.")
    code, _, errors = tool(
        tmp_path / "a.jsonl", "--env", "math_answer", *options, "--share", 0, "--out", tmp_path / "o"
    )
    assert code == 0, errors
    made = json.loads((tmp_path / "o/manifest.json").read_text())["options"]
    assert (made["require_box"], made["instruction"]) == (False, "Answer.")


def test_one_part_alone(tmp_path, tool):
    directory = put("tooluse", tmp_path / "published")
    test = directory / "datasets/tooluse/test.json"
    code, output, errors = tool(test, "--as", "ToolUse", "--only", "test", "--out", tmp_path / "out")
    assert code == 0 and "2 read, 2 test." in output, errors
    assert "Note: test has 2 problems here, and 68 as published." in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "test.jsonl"]


def test_another_revision_and_another_set_beside_it(tmp_path, tool, monkeypatch):
    directory = put("math", tmp_path / ("b" * 40))
    asked: list[str] = []

    def download(name, *, revision, **options):
        asked.append(revision)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    against = tmp_path / "math-500.jsonl"
    against.write_bytes(lines([{"problem": "algebra level 5", "answer": "1"}]))
    code, output, errors = tool(
        *("math", "--revision", "v2", "--out", tmp_path / "out", "--against", against)
    )
    assert code == 0 and asked == ["v2"], errors
    assert f"Of {against}, 0 problems are in train too, and 1 more but for white space and case" in output
    assert "Note: train has 14 problems here, and 7500 as published." in output


def test_memory_does_not_grow_with_the_set(tmp_path):
    def peak(count: int) -> int:
        path, out = tmp_path / f"{count}.jsonl", tmp_path / f"out{count}"
        with path.open("w") as file:
            for n in range(count):
                file.write(json.dumps({"prompt": f"{n} " + "x" * 4000, "answer": str(n)}) + "\n")
        tracemalloc.start()
        manifest = own(path, out)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert manifest["counts"]["read"] == count
        return used

    peak(10)
    small, large = peak(500), peak(4000)
    assert large < small + 500_000, (small, large)
    assert sum(1 for _ in read_lines(tmp_path / "out4000/train.jsonl", {}, "a row")) > 3000
