"""What transformers, SGLang and the trainer find likely, each from the files of a Hugging Face directory.

    python -m tests.e2e.agreeing INITIAL DIRECTORY...

shows how far they are apart, in nats at most, on a sum and its answer, and how far each directory is from INITIAL.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_megatron.config import ServerSettings
from sdpo_megatron.launch.server import ServedModel, ServerProcess
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.rollout.client import Client
from tests.e2e.running import REPOSITORY
from tests.ranks import run_ranks
from tests.small_server import MEMORY

TIMEOUT_S = 120.0
SUM = [
    {"role": "user", "content": "What is 23 + 41? Answer with the equation."},
    {"role": "assistant", "content": "23 + 41 = 64"},
]


def by_transformers(directory: Path, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of `ids`, but the first."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return _of_tokens(network(torch.tensor([ids])).logits[0], ids)


def by_trainer(directory: Path, ids: Sequence[int]) -> Tensor:
    with tempfile.TemporaryDirectory() as work:
        out = f"{work}/logits.safetensors"
        run_ranks(1, "tests.distributed.weights:logits", str(directory), list(ids), out, {}, timeout_s=300.0)
        return _of_tokens(load_file(out)["logits"][:, : read_model_shape(directory).vocab], ids)


def _of_tokens(logits: Tensor, ids: Sequence[int]) -> Tensor:
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@contextmanager
def sglang(directory: Path) -> Iterator[ServerProcess]:
    """A real server."""
    python = REPOSITORY / ".venv-sglang/bin/python"
    assert python.exists(), "SGLang's environment is missing: run `make .venv-sglang`"
    served = ServedModel(
        path=directory,
        dtype="float32",
        device="cpu",
        context_length=512,
        max_responses=16,
        memory=MEMORY,
        seed=1,
    )
    with tempfile.TemporaryDirectory() as work:
        process = ServerProcess(ServerSettings(python=str(python)), served, Path(work) / "log")
        process.start()
        try:
            process.wait_healthy()
            yield process
        finally:
            process.stop()


def by_sglang(server: ServerProcess, directory: Path, ids: Sequence[int]) -> Tensor:
    done = httpx.post(
        f"{server.url}/update_weights_from_disk",
        json={"model_path": str(directory)},
        headers={"Authorization": f"Bearer {server.api_key}"},
        timeout=TIMEOUT_S,
    )
    assert done.is_success and done.json()["success"], done.text
    return torch.tensor(Client(server.url, server.api_key, TIMEOUT_S).prompt_logprobs(ids))


def main(initial: str, *directories: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(initial)
    ids = tokenizer.apply_chat_template(SUM, return_dict=False)
    first = by_transformers(Path(initial), ids)
    with sglang(Path(directories[0])) as server:
        for directory in map(Path, directories):
            theirs = by_transformers(directory, ids)
            ours, served = by_trainer(directory, ids), by_sglang(server, directory, ids)
            apart = [float((one - theirs).abs().max()) for one in (ours, served, first)]
            print(
                f"{directory}: on {len(ids)} tokens the trainer is {apart[0]:.1e} nats from transformers, SGLang "
                f"{apart[1]:.1e}, and {initial} {apart[2]:.1e}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
