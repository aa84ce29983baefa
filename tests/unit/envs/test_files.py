"""Files of problems in every format, under our names and other people's."""

import csv
import gzip
import io
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from sdpo_megatron.envs.data.files import read_lines
from sdpo_megatron.envs.data.json_text import read_list
from sdpo_megatron.envs.jsonl import JsonlOptions, JsonlProblems
from sdpo_megatron.envs.math_answer import MathAnswer, MathAnswerOptions
from sdpo_megatron.envs.multiple_choice import MultipleChoice, MultipleChoiceOptions
from sdpo_megatron.envs.python_tests import PythonTests, PythonTestsOptions
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from sdpo_megatron.envs.tool_call import ToolCall, ToolCallOptions
from sdpo_megatron.errors import UserError

ROWS = [
    {"question": "2 + 2?", "target": "4", "level": "easy", "source": "x"},
    {"question": "Ein, ä\nzwei?", "target": "007", "level": "hard", "source": "y"},
]


def as_csv(rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FORMATS = {
    "a.jsonl": as_lines(ROWS),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv": as_csv(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "a.parquet": as_parquet(ROWS),
    "a.csv.gz": gzip.compress(as_csv(ROWS), mtime=0),
    "a.jsonl.gz": gzip.compress(as_lines(ROWS), mtime=0),
    "list.gz": gzip.compress(json.dumps(ROWS).encode(), mtime=0),
}


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def rows_of(path, **fields) -> list[dict]:
    return [line.values for line in read_lines(path, fields, "a row")]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_with_a_mapping(name, tmp_path):
    """The answer 007 stays text in each."""
    path = write(tmp_path / name, FORMATS[name])
    fields = {"prompt": "question", "answer": "target", "difficulty": "level"}
    env = JsonlProblems(JsonlOptions(train_file=str(path), fields=fields))
    problems = env.train_problems()
    assert [problem.messages[0]["content"] for problem in problems] == ["2 + 2?", "Ein, ä\nzwei?"]
    assert [(problem.answer, problem.metadata) for problem in problems] == [
        ("4", {"difficulty": "easy"}),
        ("007", {"difficulty": "hard"}),
    ]


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        JsonlProblems(JsonlOptions(train_file=str(path), **options))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "F")


def test_what_a_mapping_lacks_is_said_with_the_mapping_and_the_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", as_lines(ROWS))
    columns = "the columns are question, target, level, source."
    assert refusal(path) == (
        "F line 1: unknown key 'question'. Known: id, prompt, messages, answer, grader, canonical, metadata. "
        "The columns are question, target, level, source; task.options.fields={prompt: ...} maps one."
    )
    assert refusal(path, fields={"prompt": "question"}) == (
        f"F line 1: 'answer' is missing; add it. In use is task.options.fields={{prompt: question}}; {columns}"
    )
    assert refusal(path, fields={"promt": "question", "answer": "target"}) == (
        "F line 1: unknown key 'promt'. Did you mean 'prompt'? Known: id, prompt, messages, answer, grader, canonical, "
        f"metadata. In use is task.options.fields={{promt: question, answer: target}}; {columns}"
    )
    assert refusal(path, fields={"prompt": "questoin", "answer": "target"}) == (
        "F line 1: task.options.fields reads prompt from 'questoin', but there is no such column. "
        "Did you mean 'question'? The columns are question, target, level, source."
    )


@pytest.mark.parametrize(
    ("env", "options", "row", "fields"),
    [
        (MathAnswer, MathAnswerOptions, {"q": "1+1?", "a": "2"}, {"question": "q", "answer": "a"}),
        (
            MultipleChoice,
            MultipleChoiceOptions,
            {"q": "?", "o": ["x", "y"], "a": "B"},
            {"question": "q", "options": "o", "answer": "a"},
        ),
        (
            ToolCall,
            ToolCallOptions,
            {"q": "?", "a": [{"Action": "f", "Action_Input": {}}]},
            {"prompt": "q", "answer": "a"},
        ),
    ],
)
@pytest.mark.parametrize("form", ["lines", "csv", "parquet"])
def test_every_environment_that_reads_files_takes_a_mapping_and_labels(
    env, options, row, fields, form, tmp_path
):
    row = row | {"d": "algebra", "l": 3}
    if form == "csv":
        row = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
    if form == "parquet" and env is ToolCall:
        row["a"] = json.dumps(row["a"])  # a struct without fields cannot be written
    path = write(
        tmp_path / f"a.{form}", {"lines": as_lines, "csv": as_csv, "parquet": as_parquet}[form]([row])
    )
    made = env(
        options(train_file=str(path), test_file=str(path), fields=fields | {"domain": "d", "difficulty": "l"})
    )
    [problem] = made.train_problems()
    assert problem.metadata["domain"] == "algebra" and problem.metadata["difficulty"] == "3"
    assert made.test_problems() == made.train_problems()
    with pytest.raises(UserError, match=r"fields=\{.*\}; the columns are q, "):
        short = dict(list(fields.items())[:-1])
        env(options(train_file=str(path), fields=short))


def test_programs_take_a_mapping_and_labels(tmp_path):
    rows = [{"q": f"{n}?", "t": [{"input": "", "output": ""}], "level": "hard"} for n in range(3)]
    path = write(tmp_path / "a.jsonl", as_lines(rows))
    options = PythonTestsOptions(
        train_file=str(path),
        format="own",
        fields={"prompt": "q", "tests": "t", "difficulty": "level"},
        sandbox=SandboxSettings.model_validate({"backend": "unsafe_subprocess"}),
    )
    env = PythonTests(options)
    for split, problems in (("train", env.train_problems()), ("test", env.test_problems())):
        assert problems and all(p.metadata == {"tests": split, "difficulty": "hard"} for p in problems)
    options = options.model_copy(update={"fields": {"prompt": "q"}})
    with pytest.raises(
        UserError, match=r"'tests' is missing; add it\. In use is task.options.fields=\{prompt: q\}"
    ):
        PythonTests(options)


def test_labels(tmp_path):
    rows = [
        {"prompt": "x", "answer": "y", "domain": "a", "difficulty": 2.5, "metadata": {"domain": "z", "k": 1}},
        {"prompt": "x", "answer": "y", "domain": None},
    ]
    path = write(tmp_path / "a.jsonl", as_lines(rows))
    problems = JsonlProblems(JsonlOptions(train_file=str(path))).train_problems()
    assert [p.metadata for p in problems] == [{"domain": "a", "difficulty": "2.5", "k": 1}, {}]
    write(path, as_lines([{"prompt": "x", "answer": "y", "difficulty": ["hard"]}]))
    assert refusal(path) == "F line 1: 'difficulty' is ['hard']; write text or a number."
    write(path, as_lines([{"prompt": "x", "answer": "y", "difficulty": True}]))
    assert refusal(path) == "F line 1: 'difficulty' is True; write text or a number."


def test_empty_cells_and_nulls_are_as_if_their_column_were_not_there(tmp_path):
    table = b'id,prompt,answer,grader,canonical\n,x,4,,true\nb,"two\nlines",5,last_number,\n'
    problems = JsonlProblems(JsonlOptions(train_file=str(write(tmp_path / "a.csv", table)))).train_problems()
    assert [(p.id, p.grader, p.canonical) for p in problems] == [
        ("2", "exact", True),
        ("b", "last_number", False),
    ]
    rows = [{"prompt": "x", "answer": "4", "id": None}, {"prompt": "y", "answer": "5", "id": "b"}]
    path = write(tmp_path / "a.parquet", as_parquet(rows))
    assert [p.id for p in JsonlProblems(JsonlOptions(train_file=str(path))).train_problems()] == ["1", "b"]
    # a mapped column that has no value in a row
    assert rows_of(path, name="id") == [
        {"prompt": "x", "answer": "4"},
        {"prompt": "y", "answer": "5", "name": "b"},
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"prompt,answer\n1,2,3\n", "F line 2: 3 cells under 2 columns"),
        ("a.csv", b'prompt,answer\n"a\nb",1\nx\n', "F line 4: 1 cells under 2 columns"),
        ("a.csv", b"prompt,prompt\n1,2\n", "F line 1: the column 'prompt' is there twice; rename one."),
        ("a.csv", b'prompt,answer\n1,"2\n', "F line 2: not CSV (unexpected end of data)"),
        ("a.csv", b"prompt,answer\n", "F holds no problem"),
        ("a.csv", b"prompt,answer\n1,\xff\n", "F is not UTF-8"),
        ("a.json", b'[{"a": 1}, {"a": 1, "a": 2}]', "F entry 2: the key 'a' is there twice"),
        ("a.json", b'[{"a": 1} {"b": 1}]', "F entry 1: not JSON (neither a comma nor ] behind it)"),
        ("a.json", b'[{"a": 1}, {"a": "x]', "F entry 2: not JSON (Unterminated string"),
        ("a.json", b'[{"a": "\\udc00"}]', "F entry 1: half a character (a surrogate)"),
        ("a.json", b"[]", "F holds no problem"),
        (
            "a.json",
            b'[{"a": 1}]\n[{"a": 2}]\n',
            "F: behind the end of its list stands '[{\"a\": 2}]'; make it",
        ),
        ("a.json", b"[]" + b" " * 2_000_000 + b"x", "F: behind the end of its list stands 'x'"),
        ("a.jsonl", b'{"a": 1} {"b": 1}', "F line 1: not JSON (extra data at column 9)"),
        ("a.parquet", b"PAR1 and no more of it", "F is a damaged parquet file"),
        ("a.parquet", FORMATS["a.parquet"][:-30], "F is a damaged parquet file"),
        ("a.csv.gz", FORMATS["a.csv.gz"][:-9], "F is a damaged gzip file"),
        ("list.gz", FORMATS["list.gz"][:-9], "F is a damaged gzip file"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            "F is a pointer of git-lfs",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(name, data, message, tmp_path):
    path = write(tmp_path / name, data)
    with pytest.raises(UserError) as caught:
        if not rows_of(path):
            refusal(path)
            raise UserError(f"{path} holds no problem")
    assert str(caught.value).replace(str(path), "F").startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_entry_by_entry_wherever_a_chunk_ends(indent, monkeypatch):
    entries = [{"text": 'ä\\"]},[{' * n, "number": -12.5e3, "deep": [{"x": None}, True]} for n in range(4)]
    text = json.dumps(entries, indent=indent, ensure_ascii=indent is None) + "\n"
    for size in range(1, 60):
        monkeypatch.setattr("sdpo_megatron.envs.data.json_text._CHUNK", size)
        found = list(read_list(io.StringIO(text), "F", "a row"))
        assert found == list(enumerate(entries, start=1))


def test_a_mistake_in_a_long_list_is_found_without_reading_the_rest(monkeypatch):
    monkeypatch.setattr("sdpo_megatron.envs.data.json_text._CHUNK", 1000)
    file = io.StringIO('[{"a": nul, "b": 1},' + " " * 100_000)
    with pytest.raises(UserError, match="entry 1: not JSON"):
        list(read_list(file, "F", "a row"))
    assert file.tell() <= 2000  # two chunks


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_reading_takes_no_more_memory_for_a_longer_file(name, tmp_path):
    def peak(count: int) -> int:
        rows = [{"prompt": f"{n} " + "x" * 2000, "answer": str(n)} for n in range(count)]
        makers = {"jsonl": as_lines, "csv": as_csv, "parquet": as_parquet}
        path = write(
            tmp_path / name, makers.get(name[2:], lambda rows: json.dumps(rows, indent=1).encode())(rows)
        )
        del rows
        tracemalloc.start()
        assert sum(1 for _ in read_lines(path, {}, "a row")) == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)
    assert peak(8000) < 1.5 * peak(2000) + 1_000_000
