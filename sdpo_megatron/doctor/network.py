"""The host's name, ports that can be listened at, and proxies that would catch what stays on this machine."""

import ipaddress
import os
import socket
from collections.abc import Mapping
from urllib.request import proxy_bypass_environment  # pyright: ignore[reportAttributeAccessIssue]

import psutil

from sdpo_megatron.doctor.findings import Finding, failure, ok, warning
from sdpo_megatron.preflight.server import is_loopback

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
CONNECT_S = 2.0
MOST_ADDRESSES = 4


def host_name() -> list[Finding]:
    name = socket.gethostname()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except (OSError, UnicodeError) as error:
        todo = f"add it to /etc/hosts (127.0.1.1 {name}), or have the DNS know it: libraries ask for their own host"
        return [warning("host name", f"{name} does not resolve ({error})", todo)]
    found = f"{name} is {', '.join(addresses)}"
    if all(map(is_loopback, addresses)):
        found += ": enough on one machine; other nodes could not reach it by that"
    return [ok("host name", found, addresses=" ".join(addresses))]


def own_addresses() -> list[str]:
    """Returns the IPv4 addresses by which other machines may know this one."""
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    found = [ipaddress.ip_address(entry.address) for entry in entries if entry.family == socket.AF_INET]
    return [str(ip) for ip in found if not ip.is_loopback and not ip.is_link_local][:MOST_ADDRESSES]


def ports() -> list[Finding]:
    """Listens for a moment at a free port of loopback and of each address of this machine, and connects to it."""
    if problem := port_problem("127.0.0.1"):
        todo = "bring loopback up (ip link set lo up), or let this user make sockets: server and ranks talk over it"
        return [failure("ports", f"no free port on 127.0.0.1: {problem}", todo)]
    addresses = own_addresses()
    shut = {address: problem for address in addresses if (problem := port_problem(address))}
    if shut:
        found = "; ".join(f"{address}: {problem}" for address, problem in shut.items())
        todo = (
            "see the firewall (nft list ruleset): nodes of a run must reach each other; one machine is fine"
        )
        return [warning("ports", f"free on 127.0.0.1, but not on {found}", todo)]
    return [ok("ports", f"free on {', '.join(['127.0.0.1', *addresses])}")]


def port_problem(address: str) -> str:
    """Returns why nobody could listen at an address and be reached there; empty where it works."""
    try:
        with socket.create_server((address, 0)) as listener:
            with socket.create_connection(listener.getsockname(), CONNECT_S):
                return ""
    except OSError as error:
        return what_it_says(error)


def what_it_says(error: OSError) -> str:
    """Returns what went wrong, in the system's words: Python's name the address, too."""
    # names that do not resolve have numbers of their own, below 0
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


def proxies(environment: Mapping[str, str]) -> list[Finding]:
    """A proxy's address may hold a password, and is not shown."""
    lower = {key.lower(): value for key, value in environment.items() if value}
    named = [name for name in PROXIES if name in lower]
    if not named:
        return [ok("proxies", "none")]
    exempt = {"no": lower.get("no_proxy", "")}
    caught = [host for host in LOOPBACK if not proxy_bypass_environment(host, exempt)]
    found = f"{', '.join(named)} set"
    if caught:
        todo = f"set no_proxy={','.join(LOOPBACK)}: our own calls avoid proxies, other programs' do not"
        return [warning("proxies", f"{found}, and used for {', '.join(caught)}", todo)]
    return [ok("proxies", f"{found}, but not for this machine")]
