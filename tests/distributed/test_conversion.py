"""Weights between Hugging Face directories and megatron-core's: every bit, little memory, whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.weight_files import weights_sha256
from tests.distributed.test_checkpoint import train
from tests.families import MODEL_TYPES
from tests.ranks import run_ranks
from tests.tiny_model import make_tokenizer

pytestmark = pytest.mark.distributed
Models = Callable[..., Path]
HERE = "tests.distributed.converting"
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_family_comes_back_to_the_bit_from_every_layout(
    family: str, model: Models, tmp_path: Path
) -> None:
    """Per tensor; and in bfloat16 as torch rounds, with transformers' logits."""
    tensors = len(load_file(model(family) / "model.safetensors"))
    assert run_ranks(1, f"{HERE}:round_trips", str(model(family)), str(tmp_path)) == [[tensors] * 5]


@pytest.fixture(scope="module")
def converted(model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with a tokenizer for megatron-core, as tp=3 and pp=2 would have written it."""
    source = shutil.copytree(model("qwen3"), tmp_path_factory.mktemp("with tokenizer") / "qwen3")
    make_tokenizer().save_pretrained(source)
    out = tmp_path_factory.mktemp("converted") / "m"
    run_ranks(1, f"{HERE}:to_megatron", str(source), str(out), 3, 2)
    return out


def test_megatron_core_itself_reads_and_writes_such_directories(
    converted: Path, model: Models, tmp_path: Path
) -> None:
    """By its own GPTModel and dist_checkpointing, on three ranks; from a directory of six."""
    plain = tmp_path / "plain"
    args = (str(model("qwen3")), str(converted), str(plain), {"tp": 3})
    assert all(run_ranks(3, f"{HERE}:by_megatron_core", *args))
    (said,) = run_ranks(1, f"{HERE}:to_hf", str(plain), str(tmp_path / "hf"), str(model("qwen3")))
    assert weights_sha256(tmp_path / "hf") == weights_sha256(model("qwen3"))
    assert "Left out: 254 rows that pad the vocabulary to 768." in said
    assert "Verified: 47 tensors are the same to the bit" in said
    assert (
        f"Note: {model('qwen3')} has no tokenizer, and so the result has none; copy its tokenizer.json or"
        in said
    )
    (said,) = run_ranks(1, f"{HERE}:to_hf", str(converted), str(tmp_path / "with tokenizer"))
    assert "Verified: 47 tensors" in said and "tokenizer, and" not in said


def test_a_run_may_begin_with_such_a_directory(converted: Path, tmp_path: Path) -> None:
    """As `model.path`: converted once, with everything that the model came with."""
    told: list[str] = []
    first = resolve_model_path(str(converted), tmp_path, told.append)
    assert resolve_model_path(str(converted), tmp_path, told.append) == first
    assert len(told) == 1 and told[0].startswith(f"Converting the megatron-core checkpoint {converted} to")
    assert weights_sha256(first) == weights_sha256(resolve_model_path(str(first)))
    names = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert names <= {path.name for path in first.iterdir()}


@pytest.mark.parametrize(
    ("layout", "dtype"), [({"tp": 3, "pp": 2}, "float32"), ({"dp": 2}, "bfloat16")], ids=["tp=3 pp=2", "dp=2"]
)
def test_policy_and_teacher_of_a_run_are_those_that_it_goes_on_with(
    layout: dict[str, int], dtype: str, model: Models, samples: Path, tmp_path: Path
) -> None:
    """The teacher is the moving average, in float32, which teaches in the model's type."""
    teacher = {"name": "ema", "ema_rate": 0.05}
    train(model(), samples, layout, [0, 1], save=tmp_path / "run", dtype=dtype, teacher=teacher)
    args = (str(model()), str(tmp_path / "run"), dtype, str(tmp_path))
    ((policy, average),) = run_ranks(1, f"{HERE}:of_a_run", *args)
    assert policy[:2] == [[f"torch.{dtype}"], 2] and average[:2] == [["torch.float32"], 2]
    assert policy[2].endswith("bytes, after 2 training steps.")


def test_a_model_of_two_gigabytes_takes_a_fraction_of_that(tmp_path: Path) -> None:
    """Llama 3.2 1B's sizes, 13 layers of them: its embedding alone has 525 MB."""
    ((there, back, size),) = run_ranks(
        1, f"{HERE}:peaks", str(tmp_path), {"num_hidden_layers": 13}, timeout_s=300.0
    )
    shutil.rmtree(tmp_path)
    assert size > 2000
    assert 20 < there < 300 and 20 < back < 300


@pytest.mark.parametrize("direction", ["there", "back"])
def test_killed_at_ten_moments_it_leaves_nothing_that_loads(
    direction: str, converted: Path, model: Models, tmp_path: Path
) -> None:
    """And the one after them removes what they left."""
    args = (str(model("qwen3")), str(converted), str(tmp_path), direction, 10)
    (found,) = run_ranks(1, f"{HERE}:killed", *args)
    assert len(found) == 11 and set(found[:10]) <= {"nothing", "whole"} and found[10] == "whole"
    assert found[:10].count("nothing") >= 8


def test_bad_input(converted: Path, model: Models, samples: Path, tmp_path: Path) -> None:
    source, out = model("qwen3"), tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    run = tmp_path / "run"
    train(model(), samples, {}, [], save=run / "checkpoints")
    (run / "checkpoints" / "000007").mkdir()
    crashed = shutil.copytree(run / "checkpoints" / "000000", tmp_path / "crashed")
    (crashed / "manifest.json").unlink()
    cut = shutil.copytree(converted, tmp_path / "cut")
    with (cut / "__3_0.distcp").open("r+b") as file:
        file.truncate(1000)
    nameless = shutil.copytree(converted, tmp_path / "nameless")
    (nameless / "config.json").unlink()
    wide = shutil.copytree(source, tmp_path / "wide")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, wide / "model.safetensors")
    other = {"model": str(model("llama"))}
    more = shutil.copytree(converted, tmp_path / "more words")
    changed = json.loads((more / "config.json").read_text())
    (more / "config.json").write_text(json.dumps(changed | {"vocab_size": 1000}))
    step = run / "checkpoints" / "000000"
    cases = [
        (["there", str(tmp_path / "no"), str(out), {}], f"SRC: there is no directory {tmp_path / 'no'}"),
        (["there", str(converted), str(out), {}], f"SRC: {converted} has megatron-core's format already"),
        (
            ["there", str(source), str(tmp_path / "full"), {}],
            f"DST: {tmp_path / 'full'} is there already and is not",
        ),
        (["there", str(source), str(tmp_path / "full" / "file"), {}], "is there already and is not empty"),
        (
            ["there", str(source), str(out), {"tp": 2}],
            "--tp 2 does not divide the model's 3 key-value heads; set --tp",
        ),
        (
            ["there", str(source), str(out), {"pp": 3}],
            "--pp 3 does not divide the model's 4 layers; set --pp to",
        ),
        (
            ["there", str(wide), str(out), {"dtype": "float16"}],
            "model.norm.weight has 1 numbers of 96 that float16",
        ),
        (["back", str(tmp_path / "no"), str(out), {}], "SRC: there is no directory"),
        (["back", f"{tmp_path / 'no'}@3", str(out), {}], "There is no directory"),
        (
            ["back", str(source), str(out), {}],
            f"{source} is no checkpoint that megatron-core wrote (there is no",
        ),
        (
            ["back", f"{source}@3", str(out), {}],
            f"{source} has no checkpoint of step 3; it has: none.",
        ),
        (["back", str(cut), str(out), {}], f"{cut} is not whole: __3_0.distcp is cut short; copy it again."),
        (["back", str(nameless), str(out), {}], f"{nameless} does not say which model it is"),
        (["back", str(nameless), str(out), dict(other)], f"{nameless} has "),
        (["back", str(more), str(out), {}], "has 768 rows for tokens, but the config.json in"),
        (
            ["back", str(converted), str(out), {"whose": "teacher"}],
            "is no checkpoint of a run, and so has no teacher",
        ),
        (
            ["back", f"{run}@7", str(out), {}],
            "000007 is no complete checkpoint (it has no manifest.json); name another one.",
        ),
        (["back", f"{run}@x", str(out), {}], f"SRC: there is no directory {run}@x"),
        (
            ["back", str(run / "checkpoints" / "000007"), str(out), {}],
            "000007 is no complete checkpoint",
        ),
        (
            ["back", str(crashed), str(out), {}],
            f"{crashed} is no complete checkpoint (it has no manifest.json)",
        ),
        (["back", str(step), str(out), {}], f"{step} does not say which model it is: name its Hugging Face"),
        (
            ["back", str(run), str(out), {"model": str(source)}],
            f"{step} holds a model whose architecture is Llama",
        ),
        (
            ["back", str(run), str(out), {"whose": "teacher", **other}],
            f"{step} holds no teacher: only teacher.name=ema has weights of its own that change, and this run's "
            f"teacher is {model()}; leave --weights teacher out.",
        ),
    ]
    (said,) = run_ranks(1, f"{HERE}:refusals", [case for case, _ in cases])
    for (case, expected), message in zip(cases, said, strict=True):
        assert message.startswith(("UserError: ", "ConfigError: ")), (case, message)
        assert expected in message and "\n" not in message, (case, message)
    (message,) = run_ranks(1, f"{HERE}:no_room", str(source), str(out), 50_000_000)
    assert "will take 52,265,472 bytes, but the disk at" in message and "50,000,000 left" in message
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_a_byte_that_changed_is_found_before_anything_is_made_of_it(converted: Path, tmp_path: Path) -> None:
    there = shutil.copytree(converted, tmp_path / "there")
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=there).returncode == 0
    # a template may be another one
    (there / "chat_template.jinja").write_text("{{ messages }}")
    ((said, *_),) = run_ranks(1, f"{HERE}:refusals", [["back", str(there), str(tmp_path / "hf"), {}]])
    assert said == ""
    with (there / "__0_0.distcp").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    calls = [["back", str(there), str(tmp_path / "out"), {}]]
    ((said, *_),) = run_ranks(1, f"{HERE}:refusals", calls)
    assert said == f"RunFailed: {there} is damaged: __0_0.distcp. Put it back from a copy."
    (there / "SHA256SUMS").write_text("nothing")
    ((said, *_),) = run_ranks(1, f"{HERE}:refusals", calls)
    assert (
        said == f"RunFailed: {there} is damaged: SHA256SUMS is no list of SHA-256. Put it back from a copy."
    )
    assert not (tmp_path / "out").exists()


def test_where_a_directory_can_be_put(model: Models, tmp_path: Path) -> None:
    """A link is followed; `.` is the directory that it is."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    source, inside = str(model("qwen3")), tmp_path / "file" / "x"
    (said,) = run_ranks(1, f"{HERE}:put", source, [str(tmp_path / "link"), ".", str(inside)], str(tmp_path))
    assert said == ["", "", f"UserError: DST: {tmp_path / 'file'} is no directory; name another one."]
    for name in ("elsewhere", "here"):
        assert (tmp_path / name / "SHA256SUMS").is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_it_writes(number: int, model: Models, tmp_path: Path) -> None:
    """torch closes what it was writing by another error."""
    argv = ["hf-to-megatron", str(model("qwen3")), str(tmp_path / "m")]
    (found,) = run_ranks(1, f"{HERE}:interrupted", argv, int(number))
    assert found == [128 + number, "Stopped; nothing was written.\n"] and not list(tmp_path.iterdir())


def test_verifying_finds_what_differs(converted: Path, tmp_path: Path) -> None:
    """Bits that a disk changed; and what only the logits tell, tensors that were taken for each other,
    or a NaN."""
    bits, logits, nan, infinite = run_ranks(1, f"{HERE}:found_by_verifying", str(converted), str(tmp_path))[0]
    assert bits.startswith("RunFailed: lm_head.weight is not the same in ")
    for apart in (logits, nan):
        assert apart.startswith("RunFailed: transformers with ") and " nats apart: this is a bug." in apart
    assert infinite.startswith("RunFailed: The model's log-probabilities are not finite: ")
    assert not list(tmp_path.iterdir())


def test_rounded_weights_are_verified_in_both_directions(model: Models, tmp_path: Path) -> None:
    half = {"dtype": "bfloat16", "verify": True}
    calls = [
        ["there", str(model("qwen3")), str(tmp_path / "half"), half],
        ["there", str(model("qwen3")), str(tmp_path / "m"), {}],
        ["back", str(tmp_path / "m"), str(tmp_path / "half-hf"), half],
    ]
    assert run_ranks(1, f"{HERE}:refusals", calls) == [["", "", ""]]


@pytest.mark.parametrize("room", [100, 150_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    room: int, converted: Path, model: Models, tmp_path: Path
) -> None:
    args = (str(model("qwen3")), str(converted), str(tmp_path), room)
    (said,) = run_ranks(1, f"{HERE}:full_disk", *args)
    for message, name in zip(said, ("m", "hf"), strict=True):
        assert message.startswith(f"RunFailed: DST: {tmp_path / name} cannot be written ("), message
        assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_the_command_ends_in_a_line_and_a_code(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (result,) = run_ranks(1, f"{HERE}:command", ["hf-to-megatron", str(tmp_path), str(out)])
    assert result == [2, f"error: SRC: {tmp_path} has no config.json; give a Hugging Face model directory.\n"]
    done = subprocess.run(
        [sys.executable, "tools/convert_checkpoint.py", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: tools/convert_checkpoint.py")
