"""Two nodes, here two threads of this machine: what they see of each other, and what keeps them apart."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdpo_megatron.doctor import between as module
from sdpo_megatron.doctor.between import Place, link, own_name, shared_files
from sdpo_megatron.doctor.findings import Finding
from sdpo_megatron.launch.server import free_port

Look = Callable[[Place], list[Finding]]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    monkeypatch.setattr(module, "MEET_S", 0.5)
    monkeypatch.setattr(module, "CONNECT_S", 0.5)
    port = free_port("127.0.0.1")
    # two names of one machine
    hosts = ("localhost", "127.0.0.1")
    return [Place(number=number, hosts=hosts, port=port, directory=tmp_path) for number in (0, 1)]


def both(look: Look, places: list[Place]) -> list[list[Finding]]:
    found: list[list[Finding]] = [[], []]

    def run(number: int) -> None:
        found[number] = look(places[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_files_of_each_other(places: list[Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (finding,), others = both(shared_files, places)
    assert (finding.status, others) == ("ok", []) and 0 < float(finding.figures["seen_s"]) < 0.5
    assert f"writes in {tmp_path.parent} is seen on another after 0.0" in finding.found
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(module, "SLOW_FILES_S", 0.0)
    assert both(shared_files, places)[0][0].status == "warning"


def test_files_that_are_not_shared(places: list[Place], tmp_path: Path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    apart = [
        Place(number=place.number, hosts=place.hosts, port=place.port, directory=tmp_path / where)
        for place, where in zip(places, ("here", "there"), strict=True)
    ]
    for found, own, other in zip(both(shared_files, apart), ("localhost", "127.0.0.1"), "10", strict=True):
        assert [finding.status for finding in found] == ["failure"]
        assert found[0].found.startswith(f"{own} sees nothing of {places[0].hosts[int(other)]} in ")
        assert "--dir" in found[0].todo


def test_a_node_that_reaches_the_first(places: list[Place]):
    first, second = both(link, places)
    assert first == [] and [finding.status for finding in second] == ["ok", "ok"]
    assert second[0].found.startswith(f"127.0.0.1 reaches localhost at port {places[0].port}: ")
    assert abs(float(second[1].figures["ahead_s"])) < 0.05


@pytest.mark.parametrize("shift", [-90.0, 90.0])
def test_clocks_that_differ_by_a_minute_and_a_half(
    places: list[Place], monkeypatch: pytest.MonkeyPatch, shift: float
):
    class Shifted:
        size = module.TIME.size
        unpack = staticmethod(module.TIME.unpack)

        @staticmethod
        def pack(now: float) -> bytes:
            return real.pack(now - shift)

    real = module.TIME
    monkeypatch.setattr(module, "TIME", Shifted)
    _, second = both(link, places)
    assert second[1].status == "failure" and "chrony" in second[1].todo
    assert second[1].found.startswith(f"127.0.0.1 is 90 s {'ahead of' if shift > 0 else 'behind'} localhost")


def test_nodes_that_do_not_reach_each_other(places: list[Place], monkeypatch: pytest.MonkeyPatch):
    (finding,) = link(places[0])
    assert finding.status == "failure" and "firewall" in finding.todo
    assert finding.found == f"127.0.0.1 has not reached localhost at port {places[0].port} within 0.5 s"
    (finding,) = link(places[1])
    assert finding.found.endswith(f"localhost at port {places[0].port} within 0.5 s: Connection refused")
    # one who is reached, and says nothing
    with socket.create_server(("localhost", places[0].port)):
        start = time.monotonic()
        (finding,) = link(places[1])
        assert finding.found.endswith("within 0.5 s: timed out") and time.monotonic() - start < 2
        (finding,) = link(places[0])
        assert "cannot listen at its port" in finding.found and "Address already in use" in finding.found


def test_a_name_that_does_not_resolve(places: list[Place], monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(module.socket, "getaddrinfo", unknown)
    (finding,) = link(places[1])
    assert finding.found.endswith(" within 0.5 s: Name or service not known")


def test_a_node_that_takes_its_name_for_loopback(places: list[Place], monkeypatch: pytest.MonkeyPatch):
    (finding,) = own_name(places[1])
    assert finding.status == "failure" and "/etc/hosts" in finding.todo
    assert finding.found.startswith("127.0.0.1 takes its own name for 127.0.0.1, where other nodes")
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("10.0.0.7", 0))])
    assert own_name(places[0]) == []

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(module.socket, "getaddrinfo", unknown)
    assert own_name(places[0])[0].found == "localhost does not know its own name (Name or service not known)"
