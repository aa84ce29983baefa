"""One SGLang server over HTTP: sampling, scoring, and the control calls of a weight update.

Written against SGLang 0.5.23. Two facts that callers rely on: log-probabilities of *sampled* tokens are
those of softmax(logits / temperature), before any top-p cut; log-probabilities of *prompt* tokens are
untempered.
"""

import errno
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx
import msgspec

from sdpo_megatron.errors import RunFailed, ServerLost, ServerRefused, UserError
from sdpo_megatron.rollout.wire import Completion, read_completion, read_prompt_logprobs, read_ranked_prompt

CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 5.0
KEPT_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30),
]
"""Between a question and its answer nothing is sent for minutes: firewalls forget such connections, and nobody notices
that a machine is gone."""
SHOWN_OF_A_BODY = 500
"""Characters of an error answer that an exception repeats."""

JSON = {"Content-Type": "application/json"}
ONE_CONNECTION_PER_CALL = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""A kept connection that the server closes just as a call reuses it would look like a lost server."""


Read = TypeVar("Read")


class Client:
    """Calls to one server. `timeout_s` bounds each control call (a weight update among them).

    Every method raises ServerLost and ServerRefused, and UserError where the server wants another key."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 300.0):
        self.url = url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=ONE_CONNECTION_PER_CALL,
            # no proxy between a trainer and its server
            trust_env=False,
        )

    def move_to(self, url: str) -> None:
        """Has the client call the same server at another address, after a restart."""
        self.url = url.rstrip("/")
        self._http.base_url = httpx.URL(self.url)

    # ------------------------------------------------------------------ state

    def healthy(self) -> bool:
        """Returns whether the server has come up and answers within a few seconds.

        Servers that we did not start report themselves unhealthy while they are paused. Raises UserError
        where something else than an SGLang server answers."""
        try:
            status = self._http.get("/health", timeout=HEALTH_TIMEOUT_S).status_code
        except httpx.TransportError as error:
            if isinstance(failure := self._lost("/health", error), RunFailed):
                raise failure from error
            return False
        if status == httpx.codes.NOT_FOUND:
            raise UserError(
                f"What answers at {self.url} is no SGLang server: it has no /health; give "
                "the URL of one in server.urls."
            )
        return status == httpx.codes.OK

    def model_info(self) -> dict[str, Any]:
        """Returns among others `model_path` and `weight_version` (a string). Waits a few seconds at most, as
        `healthy`."""
        return self._info("/model_info")

    def server_info(self) -> dict[str, Any]:
        """Returns among others the server's `version`. Waits a few seconds at most."""
        return self._info("/server_info")

    # --------------------------------------------------- sampling and scoring

    def session(self) -> httpx.AsyncClient:
        """Returns what `generate` sends through, to be used inside one event loop. Nothing bounds the wait for an
        answer: whoever waits knows what else the server has to do."""
        transport = httpx.AsyncHTTPTransport(
            # what is not used is not read: certificates take a while
            verify=self._http.base_url.scheme == "https",
            limits=ONE_CONNECTION_PER_CALL,
            trust_env=False,
            socket_options=KEPT_ALIVE,
        )
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            trust_env=False,
        )

    async def generate(
        self,
        session: httpx.AsyncClient,
        prompt: msgspec.Raw,
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        stop_token_ids: Sequence[int],
    ) -> Completion:
        """Samples a response to a prompt (`wire.encoded_prompt`). While the server is paused this waits."""
        body = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": temperature,
                "top_p": top_p,
                "max_new_tokens": max_tokens,
                "stop_token_ids": list(stop_token_ids),
            },
            "return_logprob": True,
        }
        return self._read("/generate", await self._ask(session, body), read_completion)

    async def prefill(self, session: httpx.AsyncClient, prompt: msgspec.Raw) -> None:
        """Has the server put a prompt into its cache, for the responses to it that are asked for next. While the server
        is paused this waits."""
        await self._ask(
            session, {"input_ids": prompt, "sampling_params": {"max_new_tokens": 0, "temperature": 1.0}}
        )

    def prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        """Returns log p(ids[i] | ids[:i]) for i = 1 ... len(ids) - 1, untempered. While the server is paused this
        waits."""
        return self._read("/generate", self._call("POST", "/generate", _scoring(ids)), read_prompt_logprobs)

    def ranked_prompt(self, ids: Sequence[int]) -> tuple[list[float], list[int]]:
        """Returns the same, and the id of the likeliest token at each of these places."""
        body = {**_scoring(ids), "top_logprobs_num": 1}
        return self._read("/generate", self._call("POST", "/generate", body), read_ranked_prompt)

    # --------------------------------------------------------- weight updates

    def pause(self) -> None:
        """Stops sampling. When it is resumed, requests in flight go on behind the tokens that they have, whose
        KV cache is computed anew."""
        self._call("POST", "/pause_generation", {"mode": "retract"})

    def resume(self, timeout_s: float | None = None) -> None:
        """Resumes sampling; harmless on a server that is not paused. Waits `timeout_s` at most, by default as all
        control calls."""
        self._call("POST", "/continue_generation", {}, timeout_s)

    def flush_cache(self) -> None:
        """Drops cached prefixes. Refused while requests run; allowed after `pause`."""
        self._call("POST", "/flush_cache")

    def begin_update(self) -> None:
        """Opens a weight update. Servers that know no such session answer 404: they need none.

        A session left open by a trainer that died is closed first."""
        response = self._send("POST", "/begin_weight_update", {"selector": "all"})
        if response.status_code == httpx.codes.BAD_REQUEST and "already open" in response.text:
            self.end_update()
            response = self._send("POST", "/begin_weight_update", {"selector": "all"})
        if response.status_code != httpx.codes.NOT_FOUND:
            self._accept("/begin_weight_update", response)

    def end_update(self) -> None:
        response = self._send("POST", "/end_weight_update", {})
        if response.status_code != httpx.codes.NOT_FOUND:
            self._accept("/end_weight_update", response)

    def weight_checksums(self) -> list[tuple[int, dict[str, str]]] | None:
        """Returns (tensor-parallel rank, hash by parameter) of each of the server's processes; None where the server
        cannot say, or says it in a form that is not SGLang 0.5.23's."""
        response = self._send("POST", "/weights_checker", {"action": "checksum"})
        if response.status_code in (httpx.codes.NOT_FOUND, httpx.codes.BAD_REQUEST):
            return None
        answer = self._read(
            "/weights_checker", self._accept("/weights_checker", response), msgspec.json.decode
        )
        try:
            return [
                (rank["parallelism_info"][0]["tp_rank"], dict(rank["checksums"])) for rank in answer["ranks"]
            ]
        except (KeyError, IndexError, TypeError, ValueError):
            return None

    def init_update_group(
        self, *, host: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Has the server join a process group: its tensor-parallel rank r becomes rank `rank_offset` + r.

        Returns once all ranks have met: call it from a thread and join with
        `weight_group.join_weight_group`."""
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._call("POST", "/init_weights_update_group", body)

    def update_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        version: str | None,
    ) -> None:
        """Has the server receive one bucket and load it: rank 0 of the group broadcasts the bytes of its tensors,
        in order, as one uint8 tensor.

        Returns once the weights are loaded: call it from a thread and broadcast meanwhile. `dtypes` are spelt as torch
        spells them ("float32"). `version` is what rollouts are stamped with from now on; None, for all buckets but the
        last, leaves that as it is."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            # once after the last bucket is enough
            "flush_cache": False,
            "weight_version": version,
            "load_format": "flattened_bucket",
        }
        self._call("POST", "/update_weights_from_distributed", body)

    def destroy_update_group(self, group_name: str) -> None:
        self._call("POST", "/destroy_weights_update_group", {"group_name": group_name})

    # ------------------------------------------------------------ memory

    def release_memory(self, what: Sequence[str]) -> None:
        """Has the server release its `kv_cache` or `weights`, and lose what is in them. One on which something runs, or
        that was not flushed since, ends by that: pause and flush it first. Of effect with --enable-memory-saver."""
        self._call("POST", "/release_memory_occupation", {"tags": list(what)})

    def resume_memory(self, what: Sequence[str]) -> None:
        """Has the server take back what it has released; by anything else it ends."""
        self._call("POST", "/resume_memory_occupation", {"tags": list(what)})

    # ---------------------------------------------------------------- helpers

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> httpx.Response:
        timeout = self._http.timeout if timeout_s is None else timeout_s
        try:
            return self._http.request(method, path, json=body, timeout=timeout)
        except httpx.TransportError as error:
            raise self._lost(path, error) from error

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> httpx.Response:
        return self._accept(path, self._send(method, path, body, timeout_s))

    async def _ask(self, session: httpx.AsyncClient, body: Mapping[str, Any]) -> httpx.Response:
        content = msgspec.json.encode(body)
        try:
            response = await session.post("/generate", content=content, headers=JSON)
        except httpx.TransportError as error:
            raise self._lost("/generate", error) from error
        return self._accept("/generate", response)

    def _info(self, path: str) -> dict[str, Any]:
        response = self._call("GET", path, timeout_s=HEALTH_TIMEOUT_S)
        return self._read(path, response, msgspec.json.Decoder(dict[str, Any]).decode)

    def _read(self, path: str, response: httpx.Response, read: Callable[[bytes], Read]) -> Read:
        """Returns what is read from an answer. One that was cut short may come whole the next time."""
        try:
            return read(response.content)
        except msgspec.ValidationError as error:
            raise ServerRefused(
                f"what the server at {self.url} answered {path} with is not what SGLang 0.5.23 answers: {error}; start "
                "the server with that version."
            ) from None
        except msgspec.DecodeError as error:
            raise ServerLost(
                f"the server at {self.url} answered {path} with {len(response.content)} bytes that are no whole JSON: "
                f"{error}",
                self.url,
            ) from None

    def _lost(self, path: str, error: httpx.TransportError) -> ServerLost | RunFailed:
        """Returns what an exchange that broke off means. A limit of this process's own is no fault of the server."""
        if _names(error, errno.EMFILE, errno.ENFILE):
            return RunFailed(
                f"a request to {self.url} found no free file descriptor: too many files are open in this process or on "
                "this machine; raise ulimit -n, or lower rollout.max_concurrent_requests."
            )
        if isinstance(error, httpx.ReadTimeout):
            return ServerLost(f"the server at {self.url} did not answer {path} in time: it hangs", self.url)
        reason = str(error).rstrip(".") or type(error).__name__
        return ServerLost(f"the server at {self.url} cannot be reached for {path}: {reason}", self.url)

    def _accept(self, path: str, response: httpx.Response) -> httpx.Response:
        if response.status_code == httpx.codes.OK:
            return response
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise UserError(
                f"the server at {self.url} answered {path} with {response.status_code}: it wants another key; write "
                "the one that it was started with into the file server.api_key_file."
            )
        body = " ".join(response.text.split())[:SHOWN_OF_A_BODY]
        message = f"the server at {self.url} answered {path} with {response.status_code}: {body}"
        raise ServerLost(message, self.url) if response.is_server_error else ServerRefused(message)


def _scoring(ids: Sequence[int]) -> dict[str, Any]:
    return {
        "input_ids": list(ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def _names(error: BaseException | None, *numbers: int) -> bool:
    """Whether an OSError with one of these numbers is the error or what led to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        error = error.__cause__ or error.__context__
    return False
