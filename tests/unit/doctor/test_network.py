"""Names, ports and proxies."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from sdpo_megatron.doctor import network as module
from sdpo_megatron.doctor.network import host_name, own_addresses, port_problem, ports, proxies


def resolving(*addresses: str):
    def getaddrinfo(name, port):
        if not addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(2, 1, 6, "", (address, 0)) for address in addresses]

    return getaddrinfo


def test_the_hosts_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(module.socket, "getaddrinfo", resolving("192.0.2.7", "192.0.2.7"))
    (finding,) = host_name()
    assert (finding.status, finding.found) == ("ok", "node1 is 192.0.2.7")
    assert finding.figures == {"addresses": "192.0.2.7"}
    monkeypatch.setattr(module.socket, "getaddrinfo", resolving("127.0.1.1", "::1"))
    assert host_name()[0].found == (
        "node1 is 127.0.1.1, ::1: enough on one machine; other nodes could not reach it by that"
    )
    monkeypatch.setattr(module.socket, "getaddrinfo", resolving("fe80::1%eth0"))
    assert host_name()[0].found == "node1 is fe80::1%eth0"


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(module.socket, "getaddrinfo", resolving())
    (finding,) = host_name()
    assert finding.status == "warning" and "Name or service not known" in finding.found
    assert "127.0.1.1 node1" in finding.todo


def test_which_addresses_are_its_own(monkeypatch: pytest.MonkeyPatch):
    def entry(address, family=socket.AF_INET):
        return SimpleNamespace(family=family, address=address)

    interfaces = {
        "lo": [entry("127.0.0.1"), entry("::1", socket.AF_INET6)],
        "eth0": [entry("192.0.2.7"), entry("fe80::1%eth0", socket.AF_INET6)],
        "eth1": [entry("169.254.1.1")],
        "many": [entry(f"198.51.100.{number}") for number in range(9)],
    }
    monkeypatch.setattr(module.psutil, "net_if_addrs", lambda: interfaces)
    assert own_addresses() == ["192.0.2.7", "198.51.100.0", "198.51.100.1", "198.51.100.2"]


def test_ports_are_found_and_given_back():
    before = listeners()
    assert port_problem("127.0.0.1") == ""
    assert ports()[0].status in ("ok", "warning")
    assert listeners() <= before


def test_ports_that_are_shut(monkeypatch: pytest.MonkeyPatch):
    # of a documentation's network: nobody has it
    assert port_problem("203.0.113.255") == "Cannot assign requested address"
    monkeypatch.setattr(module, "own_addresses", lambda: ["203.0.113.255"])
    (finding,) = ports()
    assert finding.status == "warning"
    assert finding.found == "free on 127.0.0.1, but not on 203.0.113.255: Cannot assign requested address"
    monkeypatch.setattr(module, "own_addresses", lambda: [])
    assert ports()[0].found == "free on 127.0.0.1"
    monkeypatch.setattr(module, "port_problem", lambda address: "Operation not permitted")
    (finding,) = ports()
    assert (
        finding.status == "failure" and "no free port on 127.0.0.1: Operation not permitted" in finding.found
    )


@pytest.mark.parametrize(
    ("environment", "status", "found"),
    [
        ({}, "ok", "none"),
        ({"http_proxy": "", "HTTP_PROXY": ""}, "ok", "none"),
        (
            {"http_proxy": "http://me:secret@proxy:3128"},
            "warning",
            "http_proxy set, and used for localhost, 127.0.0.1, ::1",
        ),
        (
            {
                "HTTPS_PROXY": "http://proxy:3128",
                "all_proxy": "socks5://p",
                "no_proxy": "localhost,.example.org",
            },
            "warning",
            "https_proxy, all_proxy set, and used for 127.0.0.1, ::1",
        ),
        (
            {"http_proxy": "http://proxy", "NO_PROXY": "localhost, 127.0.0.1, ::1"},
            "ok",
            "http_proxy set, but not for this machine",
        ),
        ({"http_proxy": "http://proxy", "no_proxy": "*"}, "ok", "http_proxy set, but not for this machine"),
    ],
)
def test_proxies_that_catch_loopback(environment, status, found):
    (finding,) = proxies(environment)
    assert (finding.status, finding.found) == (status, found)


def listeners() -> set[tuple[str | int, ...]]:
    mine = psutil.Process().net_connections()
    return {tuple(connection.laddr) for connection in mine if connection.status == "LISTEN"}
