"""Lost servers: who restarts them, how often, and that the weights follow. Fakes; the real thing: tests/e2e."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.errors import RunFailed, ServerLost, UserError
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.rollout.sampler import SamplingAborted
from sdpo_megatron.rollout.ticket import Ticket
from sdpo_megatron.run_dir.server_files import ServerFiles
from sdpo_megatron.serving.canary import Noise
from sdpo_megatron.serving.recovery import Servers, Serving, check_served_model
from sdpo_megatron.stopping import Stopped
from tests.unit.launch.launching import write_model

TICKET = Ticket()


class OneRank:
    def everywhere(self, work):
        return work()

    def any(self, flag):
        return flag


class Script:
    """Each call does what comes next: returns it, or raises it."""

    def __init__(self, *outcomes, otherwise=None):
        self.outcomes = list(outcomes)
        self.otherwise = otherwise
        self.calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        self.arguments, self.options = args, options
        outcome = self.outcomes.pop(0) if self.outcomes else self.otherwise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class FakeSampler:
    """Each `collect` adds what `answers` says to the responses that have come."""

    def __init__(self, *outcomes):
        self._collect = Script(*outcomes)
        self.answers: list[int] = []
        self.answered = 0

    def collect(self, ticket):
        self.answered += self.answers.pop(0) if self.answers else 0
        return self._collect()

    def abort(self):
        pass


class FakeStop:
    requested = False

    def interrupting(self, interrupt):
        return nullcontext()


class FakeWeights:
    release: Any = None

    def __init__(self, *outcomes):
        self.push = Script(*outcomes, otherwise=True)
        self.release_servers = Script()
        self.disconnects = 0

    def disconnect(self):
        self.disconnects += 1


class FakeServers:
    def __init__(self, *outcomes):
        self.restart_lost = Script(*outcomes)
        self.files: Any = "the launcher's"
        self.start_timeout_s = 300.0


class FakeCanary:
    def __init__(self, *outcomes):
        self.check = Script(*outcomes, otherwise=Noise(0.0, 0.0))


def serving(collect=(), push=(), restart=(), canary=(), stop=None, max_restarts=2) -> tuple[Any, list[str]]:
    messages: list[str] = []
    parts = Serving(
        FakeSampler(*collect),  # type: ignore[arg-type]
        FakeServers(*restart),  # type: ignore[arg-type]
        FakeWeights(*push),  # type: ignore[arg-type]
        FakeCanary(*canary),  # type: ignore[arg-type]
        OneRank(),  # type: ignore[arg-type]
        stop or FakeStop(),  # type: ignore[arg-type]
        max_restarts=max_restarts,
        message=messages.append,
    )
    return parts, messages


def test_a_lost_server_is_restarted_and_given_the_weights_again():
    parts, messages = serving(collect=[ServerLost("gone"), ["rollouts"]])
    parts.version = 5
    assert parts.collect(TICKET) == ["rollouts"]
    assert parts.servers.restart_lost.calls == 1 and parts.weights.push.calls == 1
    assert parts.weights.disconnects == 1 and parts.canary.check.calls == 1
    assert messages == ["gone; restart (1 of 2)"]


def test_completed_rollouts_reset_the_count():
    lost = ServerLost("gone")
    parts, _ = serving(collect=[lost, lost, ["a"], lost, lost, ["b"]])
    parts.sampler.answers = [0, 0, 1, 0, 0, 1]
    assert [parts.collect(TICKET), parts.collect(TICKET)] == [["a"], ["b"]]


def test_every_answer_resets_the_count():
    """A server that dies again and again, but answers in between, gets on with the batch."""
    lost = ServerLost("gone")
    parts, messages = serving(collect=[lost, lost, lost, lost, ["a"]])
    parts.sampler.answers = [1, 0, 1, 1, 1]
    assert parts.collect(TICKET) == ["a"]
    assert [message.partition("(")[2] for message in messages] == ["1 of 2)", "2 of 2)", "1 of 2)", "1 of 2)"]


def test_the_server_that_is_named_is_restarted_and_others_that_answered_are_told_of():
    parts, messages = serving(collect=[ServerLost("gone", "http://b"), ["rollouts"]])
    parts.collect(Ticket(losses=[ServerLost("the server at http://c hangs")]))
    assert parts.servers.restart_lost.arguments == ("http://b",)
    assert messages[-1] == "the server at http://c hangs; the other servers have answered in its place"


def test_losing_it_again_and_again_ends_the_run():
    lost = ServerLost("gone")
    parts, _ = serving(collect=[lost, lost, lost])
    with pytest.raises(RunFailed, match=r"lost 3 times in a row \(gone\)"):
        parts.collect(TICKET)
    assert parts.servers.restart_lost.calls == 2


def test_a_server_lost_during_recovery_counts_too():
    parts, _ = serving(collect=[ServerLost("first"), ["rollouts"]], push=[ServerLost("second"), True])
    assert parts.collect(TICKET) == ["rollouts"]
    assert parts.servers.restart_lost.calls == 2


def test_a_push_is_tried_again():
    parts, _ = serving(push=[ServerLost("gone"), True], canary=[Noise(0.5, 0.7)])
    metrics = parts.push(3)
    assert metrics["push/canary_gap/mean"] == 0.5 and metrics["push/canary_gap/high"] == 0.7
    assert parts.servers.restart_lost.calls == 1 and parts.version == 3


def test_a_server_lost_under_the_canary_is_restarted():
    parts, _ = serving(canary=[ServerLost("gone")])
    parts.push(1)
    assert parts.weights.push.calls == 2


def test_servers_that_prove_their_weights_are_judged_by_rounding_once_only():
    """Weights that change make more or less of it; a server that came back may compute otherwise."""
    parts, _ = serving(push=[True, True, ServerLost("gone"), True, False], canary=[])
    strict = []
    for version in range(4):
        parts.push(version)
        strict.append(parts.canary.check.options["strict"])
    assert strict == [True, False, True, True]


def test_stopping_in_a_push():
    parts, _ = serving(push=[Stopped()])
    assert parts.push(3) == {}


def test_nothing_is_asked_of_servers_that_rest():
    parts, _ = serving()
    parts.weights.release = "the servers'"
    parts.sampler.submit = lambda *arguments: "ticket"
    assert parts.submit([]) == "ticket"
    parts.release_memory()
    assert parts.weights.release_servers.calls == 1
    with pytest.raises(RuntimeError, match="released their memory"):
        parts.submit([])
    parts.push(1)
    assert parts.submit([]) == "ticket"


def test_servers_with_gpus_of_their_own_are_asked_at_any_time():
    parts, _ = serving()
    parts.sampler.submit = lambda *arguments: "ticket"
    parts.release_memory()
    assert parts.submit([]) == "ticket"


def test_a_server_that_is_lost_as_it_goes_to_rest_is_met_again_at_the_next_push():
    parts, messages = serving(push=[ServerLost("gone"), True])
    parts.weights.release = "the servers'"
    parts.weights.release_servers = Script(ServerLost("it ended"))
    parts.release_memory()
    assert messages == ["it ended; it is met again at the next push"]
    parts.push(1)
    assert parts.servers.restart_lost.calls == 1 and not parts.has_released


def test_what_was_asked_is_the_weights_and_the_requests_and_nothing_after_a_push_that_was_given_up():
    parts, _ = serving()
    parts.sampler.digest = lambda requests: f"digest of {requests}"
    parts.weights.digest = "of the weights"
    assert parts.asked(["a"]) == {"the policy": "of the weights", "what is asked": "digest of ['a']"}
    parts.weights.digest = ""
    assert parts.asked(["a"]) == {}


def test_a_restart_that_fails_ends_the_run():
    parts, _ = serving(collect=[ServerLost("gone")], restart=[RunFailed("did not come up")])
    with pytest.raises(RunFailed, match="did not come up"):
        parts.collect(TICKET)


def test_a_restarted_server_that_wants_another_key_ends_the_run():
    parts, _ = serving(collect=[ServerLost("gone")], restart=[UserError("another key")])
    with pytest.raises(UserError, match="another key"):
        parts.collect(TICKET)


def test_stopping_while_a_server_is_lost():
    """What was learned is kept: the loop saves after a Stopped, and after a push that gave up."""
    parts, _ = serving(collect=[ServerLost("gone")], restart=[Stopped()])
    with pytest.raises(Stopped):
        parts.collect(TICKET)
    parts, _ = serving(push=[ServerLost("gone")], restart=[Stopped()])
    assert parts.push(3) == {}


def test_a_server_that_somebody_else_runs_is_waited_for():
    parts, messages = serving(collect=[ServerLost("gone"), ["rollouts"]])
    parts.servers.files = None
    parts.collect(TICKET)
    assert messages == ["gone; waiting up to 300 s for it to be started again (1 of 2)"]


def test_stopping_while_waiting():
    parts, _ = serving(collect=[SamplingAborted()])
    with pytest.raises(Stopped):
        parts.collect(TICKET)
    stop = FakeStop()
    stop.requested = True
    parts, _ = serving(stop=stop)
    with pytest.raises(Stopped):
        parts.collect(TICKET)
    assert parts.sampler._collect.calls == 0


SHAPE: Any = None
"""Not asked for where the served model's files cannot be seen."""


class FakeClient:
    def __init__(self, url, *health):
        self.url, self.health = url, Script(*health)
        self.resumed = 0
        self.model_info: Any = lambda: {"model_path": "somewhere/else"}

    def move_to(self, url):
        self.url = url

    def healthy(self):
        return self.health()

    def resume(self, timeout_s):
        self.resumed += 1


class Launcher(ServerFiles):
    """The launcher's side of the files: obeys a request at once, unless it restarted the server since."""

    def ask_for_restart(self, index, starts):
        record: Any = self.read(index)
        if record["starts"] == starts:
            self.write(index, record | {"starts": starts + 1, "url": "http://127.0.0.1:6"})


@pytest.mark.parametrize("health_after_loss", [False, True], ids=["gone", "answers but hangs"])
def test_a_lost_server_is_restarted_through_the_launchers_files(tmp_path, health_after_loss):
    files = Launcher(tmp_path)
    files.write(0, {"url": "http://127.0.0.1:5", "pid": 1, "starts": 1})
    client = FakeClient("", True, health_after_loss, True)
    servers = Servers([client], files, SHAPE, start_timeout_s=5, stop=FakeStop())  # type: ignore[list-item,arg-type]
    servers.wait_until_healthy()
    assert client.url == "http://127.0.0.1:5"
    servers.restart_lost("")
    assert client.url == "http://127.0.0.1:6" and servers.starts == {0: 2}


def test_who_waits_for_a_server_says_so():
    said: list[int] = []
    arguments: Any = ([FakeClient("http://127.0.0.1:5", False, False, True)], None, SHAPE, 5, FakeStop())
    Servers(*arguments, while_waiting=lambda: said.append(1)).wait_until_healthy()
    assert said == [1, 1]


def test_only_the_server_that_is_named_is_restarted_where_all_seem_well(tmp_path):
    asked: list[int] = []
    files = Launcher(tmp_path)
    for index, port in enumerate((5, 7)):
        files.write(index, {"url": f"http://127.0.0.1:{port}", "pid": 1, "starts": 1})

    def ask(index: int, starts: int) -> None:
        asked.append(index)
        Launcher.ask_for_restart(files, index, starts)

    files.ask_for_restart = ask  # type: ignore[method-assign]
    clients = [FakeClient("", *[True] * 4) for _ in range(2)]
    servers = Servers(clients, files, SHAPE, start_timeout_s=5, stop=FakeStop())  # type: ignore[arg-type]
    servers.wait_until_healthy()
    servers.restart_lost("http://127.0.0.1:7")
    assert asked == [1]


def test_a_server_that_the_launcher_restarted_by_itself_is_not_restarted_again(tmp_path):
    files = Launcher(tmp_path)
    files.write(0, {"url": "http://127.0.0.1:5", "pid": 1, "starts": 1})
    servers = Servers([FakeClient("", True, False, True)], files, SHAPE, start_timeout_s=5, stop=FakeStop())  # type: ignore[list-item,arg-type]
    servers.wait_until_healthy()
    files.write(0, {"url": "http://127.0.0.1:5", "pid": 2, "starts": 2})
    servers.restart_lost("")
    assert files.read(0)["starts"] == 2  # type: ignore[index]


def test_a_server_that_wants_another_key_is_not_waited_for():
    client = FakeClient("http://127.0.0.1:5", True)
    client.model_info = Script(UserError("it wants another key"))
    servers = Servers([client], None, SHAPE, start_timeout_s=5, stop=FakeStop())  # type: ignore[list-item,arg-type]
    with pytest.raises(UserError, match="another key"):
        servers.wait_until_healthy()


def test_a_server_that_was_left_paused_is_resumed():
    """SGLang's /health samples a token, which a paused server never does."""
    client = FakeClient("http://127.0.0.1:5", False, True)
    Servers([client], None, SHAPE, start_timeout_s=5, stop=FakeStop()).wait_until_healthy()  # type: ignore[list-item,arg-type]
    assert client.resumed == 1


def test_a_server_that_never_gets_healthy_ends_the_run():
    servers = Servers([FakeClient("http://127.0.0.1:5")], None, SHAPE, start_timeout_s=0.1, stop=FakeStop())  # type: ignore[list-item,arg-type]
    with pytest.raises(RunFailed, match=r"not healthy after server\.start_timeout_s=0\.1 s"):
        servers.wait_until_healthy()


@pytest.mark.parametrize("launched", [True, False])
def test_who_waits_for_a_server_can_be_stopped(tmp_path, launched):
    files = Launcher(tmp_path) if launched else None
    stop = FakeStop()
    stop.requested = True
    servers = Servers([FakeClient("http://127.0.0.1:5")], files, SHAPE, start_timeout_s=5, stop=stop)  # type: ignore[list-item,arg-type]
    with pytest.raises(Stopped):
        servers.wait_until_healthy()
    if files:
        files.write(0, {"url": "http://127.0.0.1:5", "pid": 1, "starts": 0})
        files.ask_for_restart = lambda index, starts: None  # type: ignore[method-assign,assignment]
    with pytest.raises(Stopped):
        servers.restart_lost("")


def test_a_server_of_another_model_is_found_at_the_start(tmp_path):
    own, other = write_model(tmp_path / "own"), write_model(tmp_path / "other", num_hidden_layers=3)
    shape = read_model_shape(own)
    client = FakeClient("http://127.0.0.1:5", True, True, True)
    servers = Servers([client], None, shape, start_timeout_s=5, stop=FakeStop())  # type: ignore[list-item,arg-type]
    client.model_info = lambda: {"model_path": str(own)}
    servers.wait_until_healthy()
    same = write_model(tmp_path / "same", max_position_embeddings=512, eos_token_id=3)
    client.model_info = lambda: {"model_path": str(same)}
    servers.wait_until_healthy()
    client.model_info = lambda: {"model_path": str(other)}
    with pytest.raises(UserError) as caught:
        servers.wait_until_healthy()
    assert str(caught.value) == (
        f"The server at http://127.0.0.1:5 serves {other}, whose layers is 3, but that of model.path is 4: start it "
        "with the model of model.path, or name another in server.urls."
    )


def test_a_servers_model_that_may_not_be_looked_at_is_not_compared(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """As of a server that another user runs from a home of their own."""
    shape = read_model_shape(write_model(tmp_path / "own"))

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", denied)
    check_served_model(tmp_path / "other", shape, "http://127.0.0.1:5")
