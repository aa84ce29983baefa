"""tools/hash_weights.py: the same weights have the same hashes wherever they lie, and others are named."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.run_dir.checkpoint_files import MANIFEST, OWN_CHECKSUM, seal, write_manifest, written_files
from sdpo_megatron.serving.checksums import gpu_tensor_hash, tensor_hash
from sdpo_megatron.serving.weight_hashes import Files, Served, compare, open_weights
from tests.families import MODEL_TYPES
from tests.sparse_weights import write_tensors

pytestmark = pytest.mark.distributed


def answering(model: Path, tp: int, dtype: str = "bfloat16", device: str = "cpu") -> Served:
    """What a server of this directory says; that SGLang does so: tests/contract."""
    served = Served.__new__(Served)
    files = Files(str(model), "policy", None, print)
    served.url, served._info = f"http://server-of-{model.name}", {"device": device, "dtype": dtype}
    hashed = gpu_tensor_hash if device == "cuda" else tensor_hash
    served.by_rank = [{**rank, "model.rotary_emb.cos_sin_cache": "0"} for rank in files.as_served(tp, hashed)]
    return served


def test_a_checkpoint_has_the_hashes_of_its_export_and_so_has_the_teachers_average(trained, tool):
    """Which were cut over three ranks, with padding, when they were saved."""
    for run in (trained, f"{trained}@000002", f"{trained}@2", trained / "checkpoints/000002"):
        code, out, _ = tool("hash_weights", run, trained / "policy")
        assert (code, out) == (0, "the same weights: all 47 tensors are equal\n")
    # kept in float32, taught in the model's type
    average = tool(
        "hash_weights", trained, trained / "teacher", "--weights", "teacher", "--dtype", "bfloat16"
    )
    assert average[0] == 0
    code, out, _ = tool("hash_weights", trained, trained / "teacher", "--weights", "teacher")
    assert code == 1 and "one holds float32, the other bfloat16: --dtype bfloat16" in out
    code, out, _ = tool("hash_weights", trained, trained / "teacher")
    assert code == 1 and "differs: model.embed_tokens.weight\n" in out
    assert "differs: 27 more\nnot the same weights: 47 of 47 tensors differ\n" in out


def test_one_hash_a_tensor_and_one_for_all(trained, tool):
    lines = tool("hash_weights", trained / "policy")[1].splitlines()
    assert lines[:-1] == tool("hash_weights", trained)[1].splitlines()[:-1] and len(lines) == 48
    assert lines[0].endswith(" bfloat16 [1026, 96]       model.embed_tokens.weight")
    found = json.loads(tool("hash_weights", trained / "checkpoints/000002", "--json")[1])
    assert lines[-1] == f"{found['whole']} whole, of 47 tensors"
    for line in lines[:-1]:
        assert found["tensors"][line.split()[-1]]["hash"] == line.split()[0]


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_of_every_family_a_changed_tensor_is_named_of_files_and_of_a_server(tiny_model, tmp_path, family, tp):
    model = tiny_model(family)
    changed = shutil.copytree(model, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.weight"][-1, -1] += 1e-6
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    names = ["model.layers.2.self_attn.k_proj.weight", "model.norm.weight"]
    assert compare(open_weights(str(model)), open_weights(str(changed))).differing == names
    served = answering(model, tp)
    assert compare(served, open_weights(str(model))).same
    found = compare(open_weights(str(changed)), served)
    at = [f"rank {rank} " for rank in range(tp)] if tp > 1 else [""]
    prefix = "model.layers.2.self_attn"
    joined = " + ".join(f"{prefix}.{x}_proj.weight" for x in "qkv")
    wanted = {
        f"{at[-1]}{prefix}.qkv_proj.weight (which is {joined})",
        *(f"{one}model.norm.weight" for one in at),
    }
    assert set(found.differing) == wanted and not found.only_first and not found.only_second


def test_another_type_a_missing_tensor_and_a_server_on_a_gpu(tiny_model, tmp_path):
    model = tiny_model()
    other = shutil.copytree(model, tmp_path / "other")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    # a copy beside a tied embedding says nothing of its own
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert compare(open_weights(str(model), dtype=torch.bfloat16), answering(other, 1)).same
    assert compare(open_weights(str(model), dtype=torch.bfloat16), open_weights(str(other))).same
    assert compare(open_weights(str(model)), answering(other, 1)).types == ("float32", "bfloat16")
    assert compare(answering(other, 1, device="cuda"), open_weights(str(other))).same
    assert compare(answering(other, 3), answering(other, 3)).same
    weights["model.layers.4.mlp.up_proj.weight"] = weights.pop("model.layers.3.mlp.up_proj.weight")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    found = compare(open_weights(str(other)), open_weights(str(model), dtype=torch.bfloat16))
    assert found.only_first == ["model.layers.4.mlp.up_proj.weight"]
    assert found.only_second == ["model.layers.3.mlp.up_proj.weight"] and not found.same


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "error: nowhere is no directory, run or server; give a Hugging Face directory or id,"),
        (["{run}@7"], "error: {run} has no checkpoint of step 7; it has: 000002."),
        (["{model}", "http://127.0.0.1:9"], "error: no server answers at http://127.0.0.1:9; start it, or"),
        (["http://[::1"], "error: server.urls holds 'http://[::1'; write it as http://HOST:PORT."),
        (
            ["{model}", "--api-key-file", "key"],
            "error: server.api_key_file holds the key of the servers in server.urls",
        ),
        (["{frozen}", "--weights", "teacher"], "holds no teacher: only teacher.name=ema has weights"),
        (["{model}", "--server-tp", "4"], "error: 4 ranks of a server do not divide the 6 heads of {model}."),
        (["{cut}"], "error: {cut}/model.safetensors is damaged or cut short"),
        (["{unfinished}"], "error: {unfinished} is no complete checkpoint; name another one."),
        (["{holed}"], "error: {holed} is damaged: policy.embedding.word_embeddings.weight cannot be read"),
        (["{gapped}"], "cannot be read (its parts hold 73728 numbers of 98496). Put it back from a copy."),
        (["a", "b", "c"], "hash_weights.py: error: 3 sets of weights are given; give one, or two to compare"),
        (
            ["{model}", "--server-tp", "0"],
            "hash_weights.py: error: --server-tp is a number of ranks from 1 on",
        ),
    ],
)
def test_mistakes_and_damage_are_one_line(arguments, line, trained, tool, tmp_path):
    places = {name: str(tmp_path / name) for name in ("cut", "unfinished", "holed", "frozen", "gapped")}
    places |= {"run": str(trained), "model": str(trained / "policy")}
    step = trained / "checkpoints/000002"
    shutil.copytree(trained / "policy", tmp_path / "cut")
    with (tmp_path / "cut/model.safetensors").open("rb+") as file:
        file.truncate(100_000)
    for name in ("unfinished", "holed", "frozen", "gapped"):
        shutil.copytree(step, tmp_path / name)
    (tmp_path / "unfinished/__0_0.distcp").unlink()
    for path in (tmp_path / "holed").glob("*.distcp"):
        # as long as before
        path.write_bytes(bytes(path.stat().st_size))
    _without_average(tmp_path / "frozen")
    _without_a_part(tmp_path / "gapped")
    code, out, err = tool("hash_weights", *(argument.format(**places) for argument in arguments))
    assert code in (1, 2) and out == "" and "Traceback" not in err
    assert line.format(**places) in err.splitlines()[-1]


def _without_average(checkpoint: Path) -> None:
    """As if the teacher were frozen."""
    metadata = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(metadata.replace(b"state.average.", b"state.zzzzzzz."))
    _reseal(checkpoint, {"teacher.name": "frozen"})


def _without_a_part(checkpoint: Path) -> None:
    """One of three ranks' rows of the embedding is described nowhere."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    described: Any = metadata.state_dict_metadata["policy.embedding.word_embeddings.weight"]
    described.chunks.pop()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    _reseal(checkpoint, {})


def _reseal(checkpoint: Path, identity: dict[str, str]) -> None:
    """As if it had been saved so."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    kept = {key: value for key, value in manifest.items() if key not in ("files", "sha256", OWN_CHECKSUM)}
    kept["identity"] |= identity
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, kept, seal(checkpoint, written_files(checkpoint)))


def test_memory_is_that_of_the_largest_tensor(tmp_path, tiny_model):
    """Of a directory of 600 MB whose largest tensors have 30, in a process of its own."""
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": 20, "hidden_size": 960, "intermediate_size": 2000, "vocab_size": 7800}
    config |= {"num_attention_heads": 60, "num_key_value_heads": 30, "head_dim": 16}
    (model / "config.json").write_text(json.dumps(config))
    shape = read_model_shape(model)
    from sdpo_megatron.models.weight_files import described

    sizes = dict(described(shape))
    write_tensors(model / "model.safetensors", sizes)
    size = sum(torch.Size(size).numel() for size in sizes.values()) * 4
    code = (
        "import resource, sys, torch; from sdpo_megatron.serving.weight_hashes import open_weights, by_name\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "weights = open_weights(sys.argv[1]); before = peak(); by_name(weights, 1); by_name(weights)\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True
    )
    assert size > 600e6 and int(done.stdout) * 1024 < 150e6
