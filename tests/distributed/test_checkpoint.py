"""A run goes on from a checkpoint as if it had never stopped, in the same layout bit for bit; disks may be full."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdpo_megatron.conversion.stored_weights import weights_of_checkpoint
from sdpo_megatron.run_dir.checkpoint_files import MANIFEST, newest_checkpoint, read_manifest
from sdpo_megatron.trainer.checkpoint_contents import checkpoint_contents
from tests.distributed.conftest import VOCABULARY
from tests.distributed.forging import FORGERIES, forge, reseal
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed
Models = Callable[..., Path]


def ranks_of(layout: dict[str, Any]) -> int:
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)


def train(model: Path, samples: Path, layout: dict[str, Any], steps: list[int], **options: Any) -> list[dict]:
    args = [str(model), str(samples), layout, steps, *(_or_none(options.get(k)) for k in ("save", "load"))]
    args += [options.get("optimizer"), options.get("dtype", "float32"), options.get("teacher")]
    args.append(_or_none(options.get("reference")))
    return run_ranks(ranks_of(layout), "tests.distributed.saving:train", *args)


def _or_none(path: Path | None) -> str | None:
    return None if path is None else str(path)


@pytest.mark.parametrize(
    ("layout", "dtype", "teacher"),
    [
        ({}, "float32", "frozen"),
        ({"pp": 2}, "float32", "trust_region"),
        ({"dp": 2}, "float32", "frozen"),
        ({"tp": 3, "pp": 2, "sequence_parallel": True}, "float32", "frozen"),
        ({}, "bfloat16", "frozen"),
        ({"dp": 2}, "bfloat16", "trust_region"),
    ],
    ids=["one process", "pp=2", "dp=2", "tp=3 pp=2", "bfloat16", "dp=2 bfloat16"],
)
def test_resumed_run_is_bit_equal_to_one_never_stopped(
    layout: dict[str, Any], dtype: str, teacher: str, model: Models, samples: Path, tmp_path: Path
) -> None:
    """2 steps, save, 2 steps; against load into a trainer with another policy, 2 steps. Samples are recorded ones. The
    reference is made again from its directory, which has another name then."""
    moved = shutil.copytree(model(), tmp_path / "moved")
    same = {"dtype": dtype, "teacher": {"name": teacher}}
    at_once = train(model(), samples, layout, [0, 1, 2, 3], **same)
    train(model(), samples, layout, [0, 1], save=tmp_path / "saved", **same)
    resumed = train(model(seed=1), samples, layout, [2, 3], load=tmp_path / "saved", reference=moved, **same)
    for rank, (whole, second) in enumerate(zip(at_once, resumed, strict=True)):
        assert second["first_step"] == 2
        assert whole["metrics"][2:] == second["metrics"], f"rank {rank}"
        assert whole["digest"] == second["digest"], f"rank {rank}"


@pytest.mark.parametrize(("family", "parameters"), [("olmo3", 10), ("qwen3_moe", 12)])
def test_loads_in_every_other_layout(
    family: str, parameters: int, model: Models, samples: Path, tmp_path: Path
) -> None:
    """Saved, loaded in the next layout, saved there, and so on: nothing changes but the vocabulary's padding."""
    chain = [
        {"tp": 3},
        {"pp": 2},
        {"dp": 2},
        {"tp": 3, "pp": 2, "sequence_parallel": True},
        {"tp": 3, "dp": 2},
        {},
    ]
    train(model(family), samples, {}, [0, 1], save=tmp_path / "start")
    previous = tmp_path / "start"
    for number, layout in enumerate(chain):
        train(
            model(family, seed=1),
            samples,
            layout,
            [],
            load=previous,
            save=tmp_path / str(number),
            reference=model(family),
        )
        previous = tmp_path / str(number)
        first, last = newest_checkpoint(tmp_path / "start"), newest_checkpoint(previous)
        args = (str(first), str(last), VOCABULARY)
        (tensors,) = run_ranks(1, "tests.distributed.saving:same_content", *args)
        assert tensors == 3 * parameters, layout  # policy, two moments; layers lie along an axis
    manifest = json.loads((tmp_path / "0" / "000002" / "manifest.json").read_text())
    assert manifest["layout"] == {"tp": 3, "pp": 1, "dp": 1}
    assert manifest["step"] == 2 and manifest["identity"] == {"seed": 1}


@pytest.mark.parametrize("family", ["olmo3", "qwen3_moe"])
def test_its_weights_are_read_without_the_model(
    family: str, model: Models, samples: Path, tmp_path: Path
) -> None:
    train(model(family), samples, {"pp": 2}, [], save=tmp_path)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    stored = load_file(model(family) / "model.safetensors")
    found = dict(weights_of_checkpoint(checkpoint, "policy")[0].tensors())
    assert found.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.items())
    contents = checkpoint_contents(checkpoint)
    assert contents["whole"] and contents["parameters"] == sum(tensor.numel() for tensor in stored.values())


def test_saves_before_the_first_optimizer_step(model: Models, samples: Path, tmp_path: Path) -> None:
    at_once = train(model(), samples, {"pp": 2}, [0])
    train(model(), samples, {"pp": 2}, [], save=tmp_path)
    resumed = train(model(seed=1), samples, {"pp": 2}, [0], load=tmp_path, reference=model())
    assert [rank["digest"] for rank in at_once] == [rank["digest"] for rank in resumed]


def test_settings_of_the_optimizer_are_those_of_the_new_start(
    model: Models, samples: Path, tmp_path: Path
) -> None:
    constant = {"schedule": "constant", "warmup_steps": 0}
    train(model(), samples, {}, [0], save=tmp_path, optimizer=constant)
    new = {**constant, "lr": 3e-3, "beta1": 0.5}
    (resumed,) = train(model(), samples, {}, [], load=tmp_path, optimizer=new)
    assert resumed["lr"] == 3e-3 and resumed["betas"] == [0.5, 0.999]


def test_the_newest_are_kept(model: Models, tmp_path: Path) -> None:
    (tmp_path / "000003").mkdir()  # left behind by a crash
    (tmp_path / "000003" / "__0_0.distcp").write_text("half")
    args = (str(model()), str(tmp_path), [5, 10, 9_999_999, 10], 2)
    assert run_ranks(1, "tests.distributed.saving:save_some", *args) == [["000010", "9999999"]]


@pytest.mark.parametrize("full_on", [0, 1])
@pytest.mark.parametrize("room", [100, 20_000, 100_000], ids=["no room", "some room", "some more room"])
def test_full_disk_leaves_the_older_checkpoint(
    full_on: int, room: int, model: Models, tmp_path: Path
) -> None:
    """One rank of two meets the limit, in a small file or in the midst of a large one; both say so and go on."""
    args = (str(model()), str(tmp_path), full_on, room)
    for message, after, newest, finally_newest in run_ranks(
        2, "tests.distributed.saving:save_on_a_full_disk", *args
    ):
        assert message.startswith(f"Could not write {tmp_path / '000002'} on rank {full_on}: ")
        assert message.endswith("older checkpoints are intact.") and "\n" not in message
        assert after == "['000001']"
        assert newest == str(tmp_path / "000001")
        assert finally_newest == str(tmp_path / "000002")


def test_checkpoint_of_another_model_is_refused(model: Models, samples: Path, tmp_path: Path) -> None:
    train(model(), samples, {}, [], save=tmp_path)
    (message,) = run_ranks(1, "tests.distributed.saving:load_into", str(model("qwen2")), str(tmp_path), {})
    assert message.startswith(
        f"{tmp_path / '000000'} holds a model whose architecture is LlamaForCausalLM, but "
    )
    args = (str(model(seed=1)), str(tmp_path), {}, str(model()))
    assert run_ranks(1, "tests.distributed.saving:load_into", *args) == [""]


def test_a_checkpoint_holds_no_reference(model: Models, samples: Path, tmp_path: Path) -> None:
    """It is the policy and two moments in float32, and little else; the manifest names the reference."""
    train(model(), samples, {}, [0], save=tmp_path)
    checkpoint, weights = tmp_path / "000001", model() / "model.safetensors"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert 3 * weights.stat().st_size - 50_000 < size < 3.5 * weights.stat().st_size
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert manifest["reference"] == {"directory": str(model()), "sha256": hash_of(model())}


def hash_of(directory: Path) -> str:
    """As `sha256sum model.safetensors | sha256sum` prints it."""
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    return hashlib.sha256(f"{digest}  model.safetensors\n".encode()).hexdigest()


def test_other_weights_of_the_teacher_are_refused(model: Models, samples: Path, tmp_path: Path) -> None:
    """On both ranks, though only one of them reads the file."""
    train(model(), samples, {}, [], save=tmp_path)
    changed = model(seed=1)
    args = (str(model()), str(tmp_path), {"dp": 2}, str(changed))
    messages = run_ranks(2, "tests.distributed.saving:load_into", *args)
    before, now = hash_of(model())[:12], hash_of(changed)[:12]
    assert messages == 2 * [
        f"{tmp_path / '000000'} was made with the teacher's weights in {model()} (SHA-256 {before}...), but {changed} "
        f"holds others (SHA-256 {now}...): put those back, or choose another run.name."
    ]


def test_a_checkpoint_of_another_format_is_refused(model: Models, samples: Path, tmp_path: Path) -> None:
    train(model(), samples, {}, [], save=tmp_path)
    file = tmp_path / "000000" / MANIFEST
    file.write_text(file.read_text().replace('"format": 4', '"format": 3'))
    (message,) = run_ranks(1, "tests.distributed.saving:load_into", str(model()), str(tmp_path), {})
    assert message == (
        f"{tmp_path / '000000'} has the checkpoint format 3, but this version reads format 4: go on with the version "
        "that saved it, or choose another run.name."
    )


FILES = ["common.pt", "__0_0.distcp", ".metadata", "rng_00000.pt"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_bit_is_found_before_anything_is_loaded(
    name: str, model: Models, samples: Path, tmp_path: Path
) -> None:
    """On both ranks, though only one of them reads that file."""
    train(model(), samples, {}, [], save=tmp_path)
    file = tmp_path / "000000" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    messages = run_ranks(2, "tests.distributed.saving:load_into", str(model()), str(tmp_path), {"dp": 2})
    damage = f"{tmp_path / '000000'} is damaged: {name} does not hold what was saved. "
    advice = "Put it back from a copy, or move the directory away to go on from the checkpoint before it."
    assert messages == [damage + advice] * 2


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_named(name: str, model: Models, samples: Path, tmp_path: Path) -> None:
    """As of another version of the libraries: the checksums are right."""
    train(model(), samples, {}, [], save=tmp_path)
    checkpoint = tmp_path / "000000"
    (checkpoint / name).write_bytes(b"\xff" * (checkpoint / name).stat().st_size)
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    reseal(checkpoint, manifest)
    (message,) = run_ranks(1, "tests.distributed.saving:load_into", str(model()), str(tmp_path), {})
    assert message.startswith(f"{checkpoint} cannot be read (")
    advice = "; if it is damaged, move it away to go on from the checkpoint before it."
    assert message.endswith(advice) and "\n" not in message


def test_a_forged_checkpoint_runs_nothing_and_loads_nothing(
    model: Models, samples: Path, tmp_path: Path
) -> None:
    """Its sizes and checksums are right: whoever hands a checkpoint on can see to that."""
    train(model(), samples, {}, [], save=tmp_path / "own")
    proof, directories = tmp_path / "proof", [tmp_path / "own"]
    for kind in FORGERIES:
        directories.append(shutil.copytree(tmp_path / "own", tmp_path / kind))
        forge(directories[-1] / "000000", kind, proof)
    manifest = read_manifest(tmp_path / "own" / "000000")
    assert manifest is not None
    directories.append(shutil.copytree(tmp_path / "own", tmp_path / "teacher"))
    reseal(directories[-1] / "000000", manifest | {"reference": None})
    (said,) = run_ranks(1, "tests.distributed.saving:load_each", str(model()), [*map(str, directories)])
    whole, weights = (dict(zip(directories, said[k::2], strict=True)) for k in (0, 1))
    assert not proof.exists()
    assert whole.pop(tmp_path / "own") == weights.pop(tmp_path / "own") == ""
    # weights alone are read without random states and other objects, and taught by nobody
    for kind in ("random states", "common", "object", "teacher"):
        assert weights.pop(tmp_path / kind) == "", kind
    assert all("\n" not in message and message for message in [*whole.values(), *weights.values()])
    assert "it names posix.system, which is no part of a checkpoint" in whole[tmp_path / "metadata"]
    assert "it has tensors in ../elsewhere/__0_0.distcp, outside the" in whole[tmp_path / "elsewhere"]
    assert "it names posix.system, which is no part of a checkpoint" in weights[tmp_path / "metadata"]
    assert "was made with no teacher whose weights never change" in whole[tmp_path / "teacher"]
