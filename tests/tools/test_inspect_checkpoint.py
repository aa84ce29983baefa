"""tools/inspect_checkpoint.py: what is there, and everything that is wrong with it, in a line each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdpo_megatron.models.weight_files import weights_sha256
from sdpo_megatron.run_dir.checkpoint_files import (
    MANIFEST,
    OWN_CHECKSUM,
    read_manifest,
    sha256_of,
    why_incomplete,
)
from sdpo_megatron.trainer.checkpoint_contents import PARTS
from tests.families import MODEL_TYPES

STEP = "checkpoints/000002"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The run's checkpoint, to be damaged."""
    return Path(shutil.copytree(trained / STEP, tmp_path / "run" / STEP))


@pytest.mark.distributed
def test_what_a_checkpoint_holds(trained, tool):
    code, out, _ = tool("inspect_checkpoint", f"{trained}@2", "--json")
    found = json.loads(out)
    assert code == 0 and found["whole"] and found["problems"] == [] and found["step"] == 2
    assert found["layout"] == {"tp": 3, "pp": 1, "dp": 1} and found["identity"]["teacher.name"] == "ema"
    assert found["parameters"] == sum(
        x.numel() for x in load_file(trained / "policy/model.safetensors").values()
    )
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == [*PARTS.values(), "random states of 3 ranks"]
    # 1026 tokens are filled up to 1152 on three ranks, in embedding and head
    padded = found["parameters"] + 2 * (1152 - 1026) * 96
    assert {part["numbers"] for part in parts.values() if part["tensors"]} == {padded}
    assert parts["policy"]["dtypes"] == ["bfloat16"] and parts["policy"]["bytes"] == 2 * padded
    assert parts[PARTS["optimizer.state.average"]]["dtypes"] == ["float32"]
    assert found["sha256"].keys() | {MANIFEST} == found["files"].keys()
    assert found["bytes"] == sum(path.stat().st_size for path in (trained / STEP).iterdir())


@pytest.mark.distributed
def test_it_is_shown_as_a_table(trained, tool):
    code, out, _ = tool("inspect_checkpoint", trained, "--verify")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and lines[0] == str(trained / STEP)
    assert lines[1] == "whole yes, by the SHA-256 of each file"
    assert lines[3].startswith("written by tp=3 pp=1 dp=1; torch 2.") and lines[3].endswith("; format 4")
    assert any(
        line.startswith("teacher: the policy's average 11 ") and line.endswith(" float32") for line in lines
    )
    assert "problem" not in out


def _without(name: str):
    return lambda checkpoint: next(checkpoint.glob(name)).unlink()


def _cut(name: str):
    def cut(checkpoint: Path) -> None:
        with next(checkpoint.glob(name)).open("rb+") as file:
            file.truncate(7)

    return cut


def _flipped(name: str):
    def flip(checkpoint: Path) -> None:
        path = next(checkpoint.glob(name))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return flip


def _manifest(**changes: object):
    def change(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        (checkpoint / MANIFEST).write_text(json.dumps(manifest | changes))

    return change


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("damage", "problem", "seen_by_read_manifest"),
    [
        (
            _without(MANIFEST),
            "manifest.json, which is written last, is missing: a crash left this behind, or",
            True,
        ),
        (_without("common.pt"), "common.pt is missing", True),
        (_cut("__0_0.distcp"), "__0_0.distcp has 7 bytes, not ", True),
        (_cut(MANIFEST), "manifest.json is damaged", True),
        (_flipped(MANIFEST), "manifest.json is damaged", True),
        (_manifest(step=3), "manifest.json is damaged", True),
        (_manifest(files={"common.pt": 1}), "manifest.json is damaged", True),
        (
            _manifest(format=3),
            "has the checkpoint format 3, but this version reads format 4: go on with",
            False,
        ),
        (
            _flipped("__1_0.distcp"),
            "__1_0.distcp does not hold what was saved: its SHA-256 is another",
            False,
        ),
    ],
)
def test_damage_is_named(copied, tool, damage, problem, seen_by_read_manifest):
    damage(copied)
    code, out, err = tool("inspect_checkpoint", copied, "--verify")
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert code == 1 and err == "" and len(problems) == 1 and problem in problems[0]
    assert "whole       no" in out
    assert (read_manifest(copied) is None) == bool(why_incomplete(copied)) == seen_by_read_manifest


@pytest.mark.distributed
def test_another_model_than_its_tensors_and_a_forged_description(copied, tool):
    """Both sealed as if they had been saved so."""
    manifest = json.loads((copied / MANIFEST).read_text())
    _resealed(
        copied, manifest | {"model": manifest["model"] | {"layers": 5, "ffn": 100, "tie_embeddings": True}}
    )
    _, out, _ = tool("inspect_checkpoint", copied)
    assert "problem: policy.decoder.layers.mlp.linear_fc1.weight holds 147,456 numbers, not 96,000\n" in out
    assert "problem: it has policy.output_layer.weight, which the table of Qwen3ForCausalLM has not\n" in out
    _resealed(copied, manifest | {"model": {"architecture": "Novel"}})
    _, out, _ = tool("inspect_checkpoint", copied)
    assert (
        "holds a model that this version does not describe in that way (Novel): read it with the version"
        in out
    )
    (copied / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    _resealed(copied, manifest)
    code, out, _ = tool("inspect_checkpoint", copied, "--verify")
    assert (
        code == 1 and "which is no part of a checkpoint): it is damaged, or of another version. Put it" in out
    )


def _resealed(checkpoint: Path, manifest: dict) -> None:
    from sdpo_megatron.run_dir.checkpoint_files import seal, write_manifest

    names = sorted(manifest["files"])
    kept = {key: value for key, value in manifest.items() if key not in ("files", "sha256", OWN_CHECKSUM)}
    write_manifest(checkpoint, kept, seal(checkpoint, names))
    assert sha256_of(checkpoint / MANIFEST)


@pytest.mark.distributed
def test_checkpoints_beside_it(copied, tool):
    shutil.copytree(copied, copied.with_name("000001"))
    shutil.copytree(copied, copied.with_name("000003"))
    (copied.with_name("000003") / MANIFEST).unlink()
    run = copied.parents[1]
    code, out, _ = tool("inspect_checkpoint", run)
    assert code == 0 and out.splitlines()[0] == str(copied)
    assert "  beside it   000001, 000003 (not whole)\n" in out
    for path in copied.parent.iterdir():
        (path / MANIFEST).unlink(missing_ok=True)
    code, out, err = tool("inspect_checkpoint", run)
    assert (code, out) == (2, "") and err.startswith(
        f"error: {run} has no complete checkpoint yet; wait for one"
    )


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_directory_of_every_family_is_what_its_table_says(tiny_model, tool, family):
    code, out, _ = tool("inspect_checkpoint", tiny_model(family), "--verify", "--json")
    found = json.loads(out)
    assert code == 0 and found["whole"] and found["missing"] == found["others"] == found["left_out"] == []
    assert found["weights_sha256"] == weights_sha256(tiny_model(family))
    assert found["dtypes"] == {"F32": {"tensors": found["tensors"], "numbers": found["parameters"]}}
    assert found["bytes"] == 4 * found["parameters"] and found["model"]["tie_embeddings"] is True


def test_all_that_is_wrong_with_a_directory_is_named_at_once(tiny_model, tool, tmp_path):
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.gate.weight"] = weights.pop("model.layers.0.mlp.gate_proj.weight")
    weights["model.norm.weight"] = torch.zeros(95)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors")
    code, out, _ = tool("inspect_checkpoint", model)
    assert code == 1 and "  not used    lm_head.weight\n" in out
    assert [line for line in out.splitlines() if line.startswith("problem: ")] == [
        "problem: model.norm.weight has the shape [95], but config.json describes [96]",
        "problem: it has no model.layers.0.mlp.gate_proj.weight, by the table of LlamaForCausalLM",
        "problem: it has no use for model.layers.0.mlp.gate.weight, by the table of LlamaForCausalLM",
    ]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NovelForCausalLM"]}))
    code, out, _ = tool("inspect_checkpoint", model)
    assert code == 1 and "architecture NovelForCausalLM is not supported" in out
    # what can be told is told
    assert "  tensors     39: F32 (39 tensors)\n" in out
    with (model / "model.safetensors").open("rb+") as file:
        file.truncate(1000)
    code, out, _ = tool("inspect_checkpoint", model)
    assert code == 1 and out.count("problem: ") == 2 and "model.safetensors is damaged or cut short" in out


def test_numbers_that_are_not_finite_are_found_where_they_are_read(tiny_model, tool, tmp_path):
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5:7] = float("nan")
    save_file(weights, model / "model.safetensors")
    assert tool("inspect_checkpoint", model)[0] == 0
    code, out, _ = tool("inspect_checkpoint", model, "--verify")
    assert code == 1
    assert "problem: model.layers.1.mlp.up_proj.weight holds 2 numbers that are NaN or infinite\n" in out


def test_an_export_says_what_it_is_and_nothing_is_one_line(tiny_model, tool, tmp_path):
    from sdpo_megatron.run_dir.export_record import record_export

    model = shutil.copytree(tiny_model(), tmp_path / "model")
    record_export(model, 7, "abc")
    assert "  export      after 7 steps from weights abc\n" in tool("inspect_checkpoint", model)[1]
    code, out, err = tool("inspect_checkpoint", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"error: {tmp_path}/nothing is no directory or run; give a checkpoint, RUN@STEP, or a"
    )
    assert err.count("\n") == 1
