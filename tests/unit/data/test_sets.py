"""Every set by name, from small files in its published form to problems that its environment loads."""

import functools
import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import errors

from sdpo_megatron.config import TaskSettings
from sdpo_megatron.data.prepare import Request, prepare
from sdpo_megatron.data.sets import SETS
from sdpo_megatron.data.sets.base import Origin
from sdpo_megatron.envs import build_environment
from sdpo_megatron.errors import UserError
from tests.unit.data.published import COUNTS, FILES, LABELS, put

ROOT = Path(__file__).parents[3]
UNSAFE = {"sandbox": {"backend": "unsafe_subprocess"}}


def prepared(name: str, tmp_path: Path, **options) -> dict:
    directory = put(name, tmp_path / "published")
    return prepare(Request(name=name, found=SETS[name], out=tmp_path / "out", path=directory, **options))


def test_there_are_files_of_every_set():
    assert FILES.keys() == SETS.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", SETS)
def test_a_set_s_environment_loads_what_is_prepared(name, tmp_path):
    manifest = prepared(name, tmp_path)
    counts = {part: count for part, count in manifest["counts"].items() if part in ("train", "test", "all")}
    assert counts == COUNTS[name]
    options = dict(manifest["options"])
    evaluation_only = "train_file" not in options
    options.setdefault("train_file", options.get("test_file"))
    if manifest["env"] == "python_tests":
        options |= UNSAFE
    env = build_environment(TaskSettings(env=manifest["env"], options=options))
    train, test = env.train_problems(), env.test_problems()
    if "all" in counts:
        assert len(train) == len(test) == counts["all"] and options["split"] == "paper"
    else:
        assert evaluation_only or len(train) == counts["train"]
        assert len(test) == counts.get("test", 0)
    metadata = train[0].metadata
    assert (metadata.get("domain"), metadata.get("difficulty")) == LABELS.get(name, (None, None))


@pytest.mark.parametrize("name", SETS)
def test_what_is_said_of_a_set(name):
    found = SETS[name]
    assert found.what and found.split and found.licence and found.origin is not None
    assert name == name.lower() and found.files.keys() in ({"train"}, {"test"}, {"train", "test"}, {"all"})


def test_experiments_read_what_readmes_commands_make():
    named = {
        found
        for file in (ROOT / "yaml").rglob("*.yaml")
        for found in re.findall(r"_file: *data/([^/\s]+)/(\w+)\.jsonl", file.read_text())
    }
    assert len(named) > 12 and all(part in COUNTS[name] for name, part in named)


def test_answers_of_gsm8k_and_of_gpqa_s_shuffled_options(tmp_path):
    prepared("gsm8k", tmp_path / "a")
    [row] = [json.loads(line) for line in (tmp_path / "a/out/test.jsonl").open()]
    assert row == {"question": "2 + 2?", "answer": "It is 1,000.\n#### 1,000"}
    prepared("gpqa", tmp_path / "b")
    rows = [json.loads(line) for line in (tmp_path / "b/out/test.jsonl").open()]
    for number, row in enumerate(rows):
        assert row["options"]["ABCD".index(row["answer"])] == f"right {number}"
        assert sorted(row["options"]) == [f"right {number}", "wrong 1", "wrong 3", "wrong, 2"]
    assert len({row["answer"] for row in rows}) > 1  # the right one is not always in the same place


def test_livecodebench_s_two_splits(tmp_path):
    manifest = prepared("livecodebench-v6", tmp_path / "paper")
    assert manifest["counts"] == {"read": 14, "left out by the split rule": 2, "all": 12}
    assert "same questions" in manifest["split"]
    manifest = prepared("livecodebench-v6", tmp_path / "held", variant="held_out", share=0.3)
    assert manifest["counts"]["train"] + manifest["counts"]["test"] == 12 and manifest["counts"]["test"] > 0
    [overlap] = manifest["overlap"]
    assert (overlap["exact"], overlap["alike"]) == (0, 0)
    assert manifest["options"].keys() == {"train_file", "test_file", "format"}


def test_the_parts_of_deepcoder_that_publish_one_question_twice(tmp_path):
    [overlap] = prepared("deepcoder", tmp_path)["overlap"]
    assert (overlap["of"], overlap["and"], overlap["exact"], overlap["examples"]) == (
        "train",
        "test",
        1,
        [["1", "1"]],
    )


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("sciknoweval-physics", "prompt"),
        ("math-500", "problem"),
        ("livecodebench-v6", "platform"),
        ("livecodebench-v6", "question_content"),
        ("gpqa", "Incorrect Answer 2"),
        ("humaneval", "entry_point"),
    ],
)
def test_a_missing_column_is_named_with_file_and_row(name, column, tmp_path):
    directory = put(name, tmp_path / "published")
    for path in list(directory.rglob("*.json*")) + list(directory.rglob("*.csv")):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        # in the second row, of sets that have one within the days that count
        path.write_bytes(
            content.replace(f'{column}"'.encode(), b'other"', 2).replace(column.encode(), b"other", 1)
        )
    with pytest.raises(UserError) as caught:
        prepare(Request(name=name, found=SETS[name], out=tmp_path / "out", path=directory))
    words = str(caught.value)
    assert f"{directory}/" in words and (" line 1: " in words or " line 2: " in words)
    assert f"'{column}'" in words or column == "prompt" or column == "problem", words
    assert "\n" not in words and not (tmp_path / "out").exists()


def test_no_connection_names_the_command_and_the_path(tmp_path):
    """huggingface_hub reads its variables when it is imported: in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTPS_PROXY")}
    for name, command in [
        (
            "livecodebench-v6",
            "HF_HUB_OFFLINE is set. Where it can be, run: hf download livecodebench/code_generation_lite --repo-type "
            "dataset --revision 0fe84c3912ea0c4d4a78037083943e8f0c4dd505 --include 'test6.jsonl' --local-dir DIR; "
            "then here: tools/prepare_data.py DIR --as livecodebench-v6 --out ",
        ),
        (
            "humaneval",
            "run: curl --create-dirs --location --output DIR/data/HumanEval.jsonl.gz https://raw.githubusercontent.com/"
            "openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz; then here: ",
        ),
    ]:
        done = subprocess.run(
            [sys.executable, ROOT / "tools/prepare_data.py", name, "--out", tmp_path / "out"],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 2 and command in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: {name} cannot be fetched: ")
        assert not list(tmp_path.glob("*out*"))


def test_files_beside_one_another_where_their_names_tell_them_apart(tmp_path):
    for name, fine in (("gsm8k", True), ("math", False)):
        directory = tmp_path / name
        directory.mkdir()
        for path, content in FILES[name].items():
            (directory / Path(path).name).write_bytes(content)
        request = Request(name=name, found=SETS[name], out=tmp_path / f"{name}-out", path=directory)
        if fine:
            assert prepare(request)["counts"]["read"] == 2
        else:
            with pytest.raises(
                UserError, match=r"has no algebra/train-\*\.parquet of math; get it by: hf download"
            ):
                prepare(request)


def test_what_is_downloaded_is_noted_with_its_commit(tmp_path, monkeypatch):
    snapshot = put("gsm8k", tmp_path / ("c" * 40))

    def download(name, **options):
        assert (name, options["repo_type"], options["revision"]) == ("openai/gsm8k", "dataset", "main")
        assert options["allow_patterns"] == ["main/train-*.parquet", "main/test-*.parquet"]
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    manifest = prepare(Request(name="gsm8k", found=SETS["gsm8k"], out=tmp_path / "out"))
    assert manifest["source"]["revision"] == "c" * 40 and manifest["source"]["kind"] == "hub"
    assert manifest["source"]["files"][0]["path"] == "main/train-00000-of-00001.parquet"


def test_what_github_has_is_downloaded_and_thrown_away(tmp_path, monkeypatch):
    published = put("tooluse", tmp_path / "published")
    handler = functools.partial(Quiet, directory=str(published))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Origin, "url", lambda self, path: f"http://127.0.0.1:{server.server_port}/{path}")
    request = Request(name="tooluse", found=SETS["tooluse"], out=tmp_path / "out")
    try:
        manifest = prepare(request)
        assert manifest["counts"] == {"read": 5, "train": 3, "test": 2}
        assert manifest["source"]["files"][1]["path"] == "datasets/tooluse/test.json"
        assert manifest["source"]["revision"] == "0e6d5106abe69f578c63bf38a9394e22905c8773"
        (published / "datasets/tooluse/test.json").unlink()
        with pytest.raises(UserError, match="tooluse cannot be fetched: http.*404"):
            prepare(replace(request, out=tmp_path / "other"))
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "published"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_a_set_whose_owners_admit_readers(tmp_path, monkeypatch):
    def refuse(name, **options):
        raise errors.GatedRepoError.__new__(errors.GatedRepoError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        UserError, match="ask for that on its page, then run: hf auth login. Where it can be, run: hf"
    ):
        prepare(Request(name="gpqa", found=SETS["gpqa"], out=tmp_path / "out"))
