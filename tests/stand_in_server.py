"""A small server with the part of SGLang's HTTP API that this project uses, for fast tests.

python tests/stand_in_server.py --model-path M --port P [--context-length N] [--config F] [--random-seed S]
    [--repeatable] [--slow SECONDS]
...

With `--repeatable` a token depends on the weights and the tokens before it alone, so that equal requests have equal
answers, in whatever order and however often they come. Its log gets a line "sampling for WEIGHT_VERSION" for each.

It loads a (tiny) model with transformers, really samples and scores, and really receives weights over gloo.
It takes SGLang's flags and ignores those it has no use for. `stand_in_python` makes an "interpreter" for
`server.python`, so that ServerProcess starts it in the place of SGLang. tests/contract holds it to what the
real server does.

With --slow each sampled token takes so long.

Faults: POST /_test/fault {path, kind, seconds}. Kinds: `hang` (requests to the path are never answered),
`missing` (404, as from an older server), `fail` (500), `slow` (each sampled token takes `seconds` longer),
`die` (the process is killed by the next request to the path), `none`.

Memory is only released in name, but what would end the real server ends this one: a release while something runs or
before a flush, taking back what was not released, and any use of what is released. GET /_test/calls lists the control
calls that were made, in order.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sdpo_megatron.serving.checksums import tensor_hash  # noqa: E402
from sdpo_megatron.serving.weight_group import join_weight_group  # noqa: E402

JOIN_TIMEOUT_S = 120.0


def stand_in_python(path: Path, *flags: str) -> Path:
    """Writes an executable that, called as `server.python` is, runs this server instead of SGLang's
    launcher, with further flags."""
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = -m ]; then shift; fi\n'
        "shift\n"
        f'exec {shlex.quote(sys.executable)} {shlex.join([__file__, *flags])} "$@"\n'
    )
    path.chmod(0o755)
    return path


class Refused(Exception):
    """Answered with 400."""


@dataclass
class Sampling:
    """One /generate request under way: B = n rows that grow in step; a finished row goes on with dummies."""

    prompt: list[int]
    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    stops: set[int]
    rows_BS: torch.Tensor = field(init=False)
    cache: DynamicCache | None = None
    tokens: list[list[tuple[float, int]]] = field(init=False)
    versions: list[list[str]] = field(init=False)
    finish: list[dict[str, Any] | None] = field(init=False)

    def __post_init__(self) -> None:
        self.rows_BS = torch.tensor([self.prompt] * self.n)
        self.tokens = [[] for _ in range(self.n)]
        self.versions = [[] for _ in range(self.n)]
        self.finish = [None] * self.n

    @property
    def running(self) -> bool:
        return None in self.finish

    def take(self, ids_B: torch.Tensor, logprobs_B: torch.Tensor, version: str) -> None:
        self.rows_BS = torch.cat([self.rows_BS, ids_B[:, None]], dim=1)
        for row in range(self.n):
            if self.finish[row] is not None:
                continue
            token = int(ids_B[row])
            self.tokens[row].append((float(logprobs_B[row]), token))
            self.versions[row].append(version)
            if token in self.stops:
                self.finish[row] = {"type": "stop", "matched": token}
            elif len(self.tokens[row]) == self.max_new_tokens:
                self.finish[row] = {"type": "length", "length": self.max_new_tokens}

    def end(self, reason: dict[str, Any]) -> None:
        self.finish = [reason if finish is None else finish for finish in self.finish]


def version_spans(versions: list[str]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for position, version in enumerate(versions):
        if not spans or spans[-1]["version"] != version:
            spans.append({"version": version, "start": position, "end": position})
        spans[-1]["end"] = position + 1
    return spans


class Engine:
    """The model and all state. `turn` guards everything; it is held for one decoding step at a time."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.model = AutoModelForCausalLM.from_pretrained(
            arguments.model_path, dtype=getattr(torch, arguments.dtype)
        )
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
        self.dice = torch.Generator().manual_seed(arguments.random_seed)
        self.turn = threading.Condition()
        self.version = arguments.weight_version
        self.paused = False
        self.running = 0
        self.session_open = False
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.faults: dict[str, dict[str, Any]] = {}
        if arguments.slow:
            self.faults["/generate"] = {"kind": "slow", "seconds": arguments.slow}
        self.released: set[str] = set()
        self.flushed = True
        """Whether nothing has run since the last flush."""
        self.calls: list[str] = []

    def need(self, *memory: str) -> None:
        """On a GPU, reading what is not mapped ends the process."""
        if self.released & set(memory):
            os.kill(os.getpid(), signal.SIGKILL)

    # ---------------------------------------------------------- generation

    def generate(self, body: dict[str, Any], gone: Callable[[], bool]) -> Any:
        prompt, params = body["input_ids"], body.get("sampling_params", {})
        max_new_tokens = params.get("max_new_tokens", 128)
        limit = self.arguments.context_length
        if len(prompt) >= limit or len(prompt) + max_new_tokens > limit:
            raise Refused(f"{len(prompt)} + {max_new_tokens} tokens exceed the context length of {limit}")
        with self.turn:
            while self.paused:
                self.turn.wait()
            self.need("weights", "kv_cache")
            self.flushed = False
            if max_new_tokens == 0:
                start = body.get("logprob_start_len", -1)
                return self.scored(prompt, start, body.get("top_logprobs_num", 0))
            sampling = Sampling(
                prompt=prompt,
                n=params.get("n", 1),
                temperature=params.get("temperature", 1.0),
                top_p=params.get("top_p", 1.0),
                max_new_tokens=max_new_tokens,
                stops=set(params.get("stop_token_ids", [])) | self.end_tokens(params),
            )
            self.running += 1
            # in one piece: unbuffered, print would let another thread's line in before the line's end
            sys.stdout.write(f"sampling for {self.version}\n")
            sys.stdout.flush()
        try:
            while sampling.running:
                time.sleep(self.faults.get("/generate", {}).get("seconds", 0.0))
                with self.turn:
                    self.step(sampling)
                if gone():
                    sampling.end({"type": "abort", "message": "The client left"})
        finally:
            with self.turn:
                self.running -= 1
                self.turn.notify_all()
        answers = [self.answer(sampling, row) for row in range(sampling.n)]
        return answers if sampling.n > 1 else answers[0]

    def end_tokens(self, params: dict[str, Any]) -> set[int]:
        return set() if params.get("ignore_eos") else {self.tokenizer.eos_token_id}

    def step(self, sampling: Sampling) -> None:
        while self.paused:
            sampling.cache = None
            self.turn.wait()
        self.need("weights", "kv_cache")
        self.flushed = False
        ids_BS = sampling.rows_BS
        if sampling.cache is None:
            sampling.cache = DynamicCache()
        else:
            ids_BS = ids_BS[:, -1:]
        with torch.no_grad():
            logits_BV = self.model(input_ids=ids_BS, past_key_values=sampling.cache).logits[:, -1]
        logprobs_BV = (logits_BV / (sampling.temperature or 1.0)).log_softmax(-1)
        if sampling.temperature == 0:
            ids_B = logprobs_BV.argmax(-1)
        else:
            if self.arguments.repeatable:
                self.dice.manual_seed(zlib.crc32(sampling.rows_BS.numpy().tobytes()))
            ids_B = torch.multinomial(self.nucleus(logprobs_BV, sampling.top_p), 1, generator=self.dice)[:, 0]
        sampling.take(ids_B, logprobs_BV.gather(1, ids_B[:, None])[:, 0], self.version)

    @staticmethod
    def nucleus(logprobs_BV: torch.Tensor, top_p: float) -> torch.Tensor:
        """Probabilities, zero outside the smallest set of tokens whose mass reaches top_p."""
        ordered_BV, order_BV = logprobs_BV.exp().sort(-1, descending=True)
        before_BV = ordered_BV.cumsum(-1) - ordered_BV
        return torch.zeros_like(logprobs_BV).scatter(1, order_BV, ordered_BV * (before_BV < top_p))

    def answer(self, sampling: Sampling, row: int) -> dict[str, Any]:
        ids = [token for _, token in sampling.tokens[row]]
        return {
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "output_ids": ids,
            "meta_info": self.meta(sampling.prompt, ids, sampling.finish[row])
            | {
                "weight_versions": version_spans(sampling.versions[row]),
                "output_token_logprobs": [[logprob, token, None] for logprob, token in sampling.tokens[row]],
            },
        }

    def scored(self, prompt: list[int], start: int, top: int) -> dict[str, Any]:
        with torch.no_grad():
            logprobs_SV = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        entries: list[Any] = [[None, prompt[0], None]]
        entries += [[float(logprobs_SV[i - 1, prompt[i]]), prompt[i], None] for i in range(1, len(prompt))]
        meta = self.meta(prompt, [], {"type": "length", "length": 0})
        meta["input_token_logprobs"] = entries[start:] if start >= 0 else []
        meta["output_token_logprobs"] = []
        if top:
            values_SK, ids_SK = logprobs_SV.topk(top)
            ranked = [
                [[value, token, None] for value, token in zip(*row, strict=True)]
                for row in zip(values_SK[:-1].tolist(), ids_SK[:-1].tolist(), strict=True)
            ]
            meta["input_top_logprobs"] = [None, *ranked]
        return {"text": "", "output_ids": [], "meta_info": meta}

    def meta(self, prompt: list[int], ids: list[int], finish: Any) -> dict[str, Any]:
        counts = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"finish_reason": finish, "weight_version": self.version, **counts}

    # ------------------------------------------------------------- control

    def model_info(self) -> dict[str, Any]:
        return {
            "model_path": self.arguments.model_path,
            "weight_version": self.version,
            "is_generation": True,
        }

    def pause(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("mode") != "retract":
            raise Refused("this stand-in only retracts")
        with self.turn:
            self.paused = True
            self.turn.notify_all()
        return {"message": "Generation paused successfully.", "status": "ok"}

    def resume(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.turn:
            self.paused = False
            self.turn.notify_all()
        return {"message": "Generation continued successfully.", "status": "ok"}

    def flush(self, body: dict[str, Any]) -> str:
        with self.turn:
            if self.running and not self.paused:
                raise Refused("Flush cache failed: requests are running or waiting.")
            self.flushed = True
        return "Cache flushed."

    def release_memory(self, body: dict[str, Any]) -> None:
        with self.turn:
            if not self.flushed:
                os.kill(os.getpid(), signal.SIGKILL)
            self.released |= set(body["tags"])

    def resume_memory(self, body: dict[str, Any]) -> None:
        with self.turn:
            if not self.released >= set(body["tags"]):
                os.kill(os.getpid(), signal.SIGKILL)
            self.released -= set(body["tags"])

    def begin(self, body: dict[str, Any]) -> dict[str, Any]:
        self.need("weights")
        if self.session_open:
            raise Refused("a weight-update session is already open; call end_weight_update() first")
        self.session_open = True
        return {"success": True, "message": "Success"}

    def end(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.session_open:
            raise Refused("no weight-update session is open; call begin_weight_update() first")
        self.session_open = False
        return {"success": True, "message": "Success"}

    def check_weights(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("action") != "checksum":
            raise Refused("this stand-in only hashes")
        self.need("weights")
        with self.turn:
            checksums = {
                name: tensor_hash(x) for name, x in fused(dict(self.model.named_parameters())).items()
            }
        rank = {"checksums": checksums, "parallelism_info": [{"role": "target", "tp_rank": 0, "tp_size": 1}]}
        return {"success": True, "message": "Success", "ranks": [rank]}

    def init_group(self, body: dict[str, Any]) -> dict[str, Any]:
        store = TCPStore(body["master_address"], body["master_port"], body["world_size"], is_master=False)
        name = body["group_name"]
        self.groups[name] = join_weight_group(
            store, body["world_size"], body["rank_offset"], name, body["backend"], JOIN_TIMEOUT_S
        )
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    def destroy_group(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["group_name"] not in self.groups:
            raise Refused("The group to be destroyed does not exist.")
        dist.destroy_process_group(self.groups.pop(body["group_name"]))
        return {"success": True, "message": "Succeeded to destroy custom process group."}

    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.session_open and self.faults.get("/begin_weight_update", {}).get("kind") != "missing":
            raise Refused("update_weights_from_distributed must run between begin and end_weight_update()")
        self.need("weights")
        dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
        weights = self.receive(body, dtypes, [torch.Size(shape) for shape in body["shapes"]])
        parameters = dict(self.model.named_parameters())
        with self.turn, torch.no_grad():
            for name, weight in weights:
                if name in parameters:  # SGLang, too, passes over names that it does not know
                    parameters[name].copy_(weight)
            if body.get("weight_version") is not None:
                self.version = body["weight_version"]
        return {"success": True, "message": "Succeeded to update parameter online."}

    def receive(self, body: dict[str, Any], dtypes: list[torch.dtype], shapes: list[torch.Size]) -> Any:
        group = self.groups[body["group_name"]]
        if body.get("load_format") != "flattened_bucket":
            raise Refused("this stand-in only takes flattened buckets")
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        dist.broadcast(flat, src=0, group=group)
        parts = [part.view(dtype) for part, dtype in zip(flat.split(sizes), dtypes, strict=True)]
        return [
            (name, part.view(shape)) for name, part, shape in zip(body["names"], parts, shapes, strict=True)
        ]


def fused(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters as SGLang has them: some joined, embedding and head with a multiple of 64 rows."""
    joined: dict[str, list[torch.Tensor]] = {}
    for name, parameter in parameters.items():
        for one, whole in (("q_proj", "qkv_proj"), ("k_proj", "qkv_proj"), ("v_proj", "qkv_proj"),
                           ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj")):  # fmt: skip
            name = name.replace(f".{one}.", f".{whole}.")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            parameter = torch.nn.functional.pad(parameter, (0, 0, 0, -len(parameter) % 64))
        joined.setdefault(name, []).append(parameter)
    return {name: torch.cat(parts) for name, parts in joined.items()}


ROUTES = {
    "/weights_checker": Engine.check_weights,
    "/flush_cache": Engine.flush,
    "/pause_generation": Engine.pause,
    "/continue_generation": Engine.resume,
    "/release_memory_occupation": Engine.release_memory,
    "/resume_memory_occupation": Engine.resume_memory,
    "/begin_weight_update": Engine.begin,
    "/end_weight_update": Engine.end,
    "/init_weights_update_group": Engine.init_group,
    "/destroy_weights_update_group": Engine.destroy_group,
    "/update_weights_from_distributed": Engine.update,
}


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, "")
        elif self.path == "/_test/calls":
            self.reply(200, self.engine.calls)
        elif not self.allowed():
            self.reply(401, {"error": "Unauthorized"})
        elif self.path == "/model_info":
            self.reply(200, self.engine.model_info())
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/_test/fault":
            self.engine.faults[body["path"]] = body
            self.reply(200, "")
        elif not self.allowed():
            self.reply(401, {"error": "Unauthorized"})
        elif self.path not in ROUTES and self.path != "/generate":
            self.reply(404, {"detail": "Not Found"})
        else:
            self.serve(body)

    def serve(self, body: dict[str, Any]) -> None:
        match self.engine.faults.get(self.path, {}).get("kind"):
            case "hang":
                threading.Event().wait()
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "missing":
                return self.reply(404, {"detail": "Not Found"})
            case "fail":
                return self.reply(500, "Internal Server Error")
        try:
            if self.path != "/generate":
                self.engine.calls.append(" ".join([self.path, *body.get("tags", [])]))
            if self.path == "/generate":
                self.reply(200, self.engine.generate(body, self.client_left))
            else:
                self.reply(200, ROUTES[self.path](self.engine, body))
        except Refused as error:
            self.reply(400, {"success": False, "message": str(error), "error": {"message": str(error)}})

    def client_left(self) -> bool:
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:  # nothing to read: it waits for its answer
            return False
        except ConnectionError:
            return True

    def allowed(self) -> bool:
        key = self.engine.arguments.api_key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def reply(self, status: int, content: Any) -> None:
        payload = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context-length", type=int, default=1 << 20)
    parser.add_argument("--config")
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeatable", action="store_true")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--weight-version", default="default")
    arguments, _ = parser.parse_known_args()
    private = {} if arguments.config is None else yaml.safe_load(Path(arguments.config).read_text())
    arguments.api_key = private.get("api-key")
    # as SGLang does
    print(f"server_args={arguments}", flush=True)
    torch.set_num_threads(1)
    Handler.engine = Engine(arguments)
    Server((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
