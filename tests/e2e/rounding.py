"""What a rank runs: the canary of SmolLM2 in bfloat16, beside transformers in the place of a server."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.serving.calls import Calls
from sdpo_megatron.serving.canary import Canary, rounding
from sdpo_megatron.stopping import StopRequest
from sdpo_megatron.trainer.hf_weights import load_hf_weights
from sdpo_megatron.trainer.model import build_model
from sdpo_megatron.trainer.parallel import initialize
from sdpo_megatron.trainer.score import Head, Packer, Scorer

KINDS = ("right", "swapped", "one layer dropped", "another rope", "another norm")


class Transformers:
    url = "transformers"

    def __init__(self, kind: str, model: Path, scratch: Path):
        if kind.startswith("another"):
            config = json.loads((model / "config.json").read_text())
            if kind == "another rope":
                config["rope_parameters" if "rope_parameters" in config else "rope_scaling"] = None
                config["rope_theta"] = 10_000.0
            else:
                config["rms_norm_eps"] = 1e-2
            scratch = scratch / kind.replace(" ", "_")
            shutil.copytree(model, scratch)
            (scratch / "config.json").write_text(json.dumps(config))
            model = scratch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        layers = self.model.model.layers
        with torch.no_grad():
            if kind == "swapped":
                for layer in layers:
                    key, value = layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
                    kept = key.clone()
                    key.copy_(value)
                    value.copy_(kept)
            if kind == "one layer dropped":
                for parameter in layers[15].parameters():
                    if parameter.dim() == 2:
                        parameter.copy_(torch.randn_like(parameter) * 0.02)

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def judge_smollm2(model: str, scratch: str, ids: list[int]) -> dict[str, str]:
    """What the canary says of each kind of server, "" where it is content."""
    parallel = initialize(ParallelSettings(), device=torch.device("cpu"), seed=0)
    shape = read_model_shape(Path(model))
    chunks = build_model(shape, torch.bfloat16, parallel)
    load_hf_weights(chunks, Path(model), shape, parallel)
    head = Head(shape, parallel, temperature=1.0, chunk_tokens=64)
    scorer = Scorer(chunks, head, Packer(parallel, micro_batch_tokens=512, share_prefixes=True), parallel)
    noise = rounding(ids, scorer, shape, parallel, Path(scratch) / "rounding.json")
    said = {}
    for kind in KINDS:
        server = Transformers(kind, Path(model), Path(scratch))
        canary = Canary(ids, scorer, Calls(StopRequest()), [server], noise, 4.0, print)  # type: ignore[list-item]
        try:
            gap = canary.check(0, strict=True)
            said[kind] = ""
        except RunFailed as error:
            said[kind] = str(error)
        print(kind, said[kind] or gap)
    return said
