"""What needs several nodes: whether they see each other's files, reach each other, and agree on the time.

All nodes call the same functions at about the same time. The first one, or who asked it, has what was measured; the
others report only what is wrong."""

import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdpo_megatron.cluster.layout import BLOCKS, FIRST_PORT, PORTS_EACH
from sdpo_megatron.doctor import clock
from sdpo_megatron.doctor.findings import Finding, failure, ok, warning
from sdpo_megatron.doctor.network import what_it_says
from sdpo_megatron.doctor.run_directory import finds_canary, write_canary
from sdpo_megatron.preflight.server import is_loopback

FILES, LINK, CLOCKS, NAME = "shared files", "link between nodes", "clocks of the nodes", "name among nodes"
MEET_S, CONNECT_S = 40.0, 8.0
ROUNDS = 3
SLOW_FILES_S, MOST_APART_S = 3.0, 1.0
SLOW_LINK_S = 0.05
QUESTIONS = 10
TIME = struct.Struct("!d")
FILES_TODO = (
    "name a directory by --dir that all nodes see, and set run.dir to one: checkpoints are read on others"
)
LINK_TODO = (
    f"have the nodes' firewall let them reach each other at TCP ports {FIRST_PORT} to "
    f"{FIRST_PORT + BLOCKS * PORTS_EACH - 1} and those that systems hand out, or leave out a node that is cut off "
    "(hardware.sbatch_args: {exclude: NODE})"
)
NAME_TODO = "have /etc/hosts, or the DNS, give the node's own name the address by which other nodes reach it"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One node among those that are examined together."""

    number: int
    hosts: tuple[str, ...]
    """Their names, as the job calls them."""
    port: int
    """The first of the job's ports."""
    directory: Path
    """Where all of them can write."""

    @property
    def own(self) -> str:
        return self.hosts[self.number]

    @property
    def others(self) -> list[str]:
        return [host for host in self.hosts if host != self.own]


def shared_files(place: Place) -> list[Finding]:
    """Each node writes a file and looks for the others'; then a file goes back and forth, by the first one's clock."""
    write_canary(place.directory, f"{place.own}-begun")
    end = time.monotonic() + MEET_S
    unseen = [
        other
        for other in place.others
        if not finds_canary(place.directory, f"{other}-begun", end - time.monotonic())
    ]
    if unseen:
        found = f"{place.own} sees nothing of {', '.join(unseen)} in {place.directory} within {MEET_S:g} s"
        return [failure(FILES, found, FILES_TODO)]
    start = time.monotonic()
    for turn in range(ROUNDS):
        for number in range(len(place.hosts)):
            if number == place.number:
                write_canary(place.directory, f"{number}-{turn}")
            elif not finds_canary(place.directory, f"{number}-{turn}", end - time.monotonic()):
                found = f"{place.own} does not see a new file of {place.hosts[number]} within {MEET_S:g} s"
                return [failure(FILES, found, FILES_TODO)]
    if place.number:
        return []
    seen_s = (time.monotonic() - start) / (ROUNDS * len(place.hosts))
    found = f"a file that one node writes in {place.directory.parent} is seen on another after {seen_s:.2g} s"
    if seen_s > SLOW_FILES_S:
        todo = "have it mounted with a shorter cache of names (NFS: actimeo), or set run.dir elsewhere"
        return [warning(FILES, found, todo, seen_s=seen_s)]
    return [ok(FILES, found, seen_s=seen_s)]


def own_name(place: Place) -> list[Finding]:
    """A server listens at its node's name: where that is loopback nobody else reaches it."""
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(place.own, None)}
    except OSError as error:
        return [failure(NAME, f"{place.own} does not know its own name ({error.strerror})", NAME_TODO)]
    if all(map(is_loopback, addresses)):
        found = f"{place.own} takes its own name for {', '.join(sorted(addresses))}, where other nodes do not reach it"
        return [failure(NAME, found, NAME_TODO)]
    return []


def link(place: Place) -> list[Finding]:
    """The first node tells its time at the job's first port, and the others ask for it."""
    return _answer(place) if place.number == 0 else _ask(place)


def _answer(place: Place) -> list[Finding]:
    missing = set(range(1, len(place.hosts)))
    end = time.monotonic() + CONNECT_S
    try:
        with socket.create_server((place.own, place.port)) as listener:
            while missing and (left := end - time.monotonic()) > 0:
                listener.settimeout(left)
                with suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(max(0.1, end - time.monotonic()))
                        missing.discard(_serve(connection))
    except OSError as error:
        found = f"{place.own} cannot listen at its port {place.port}: {what_it_says(error)}"
        return [failure(LINK, found, LINK_TODO)]
    if missing:
        names = ", ".join(place.hosts[number] for number in sorted(missing))
        found = f"{names} has not reached {place.own} at port {place.port} within {CONNECT_S:g} s"
        return [failure(LINK, found, LINK_TODO)]
    return []


def _serve(connection: socket.socket) -> int:
    """Tells the time for each byte, which is the asking node's number; returns that once it has left."""
    number = 0
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while byte := connection.recv(1):
        number = byte[0]
        connection.sendall(TIME.pack(time.time()))
    return number


def _ask(place: Place) -> list[Finding]:
    end, where = time.monotonic() + CONNECT_S, f"{place.hosts[0]} at port {place.port}"
    said = "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((place.hosts[0], place.port), left) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return _asked(place, where, connection)
        # it may not listen yet
        except OSError as error:
            said = what_it_says(error)
            time.sleep(0.1)
    return [failure(LINK, f"{place.own} does not reach {where} within {CONNECT_S:g} s: {said}", LINK_TODO)]


def _asked(place: Place, where: str, connection: socket.socket) -> list[Finding]:
    answers: list[tuple[float, float]] = []
    for _ in range(QUESTIONS):
        start, before = time.monotonic(), time.time()
        connection.sendall(bytes([place.number]))
        answer = connection.recv(TIME.size, socket.MSG_WAITALL)
        took = time.monotonic() - start
        if len(answer) < TIME.size:
            raise ConnectionResetError("the connection was closed")
        answers.append((took, before + took / 2 - TIME.unpack(answer)[0]))
    took_s, ahead_s = min(answers)
    reached = f"{place.own} reaches {where}: {took_s * 1000:.2g} ms there and back"
    apart = (
        f"{place.own} is {abs(ahead_s):.2g} s {'ahead of' if ahead_s > 0 else 'behind'} {place.hosts[0]}, "
        f"within {took_s / 2:.1g} s"
    )
    slow = "see which network the nodes' names lead to: ranks wait for each other hundreds of times a step"
    return [
        warning(LINK, reached, slow, there_and_back_s=took_s)
        if took_s > SLOW_LINK_S
        else ok(LINK, reached, there_and_back_s=took_s),
        failure(CLOCKS, apart, clock.TODO, ahead_s=ahead_s)
        if abs(ahead_s) > MOST_APART_S
        else ok(CLOCKS, apart, ahead_s=ahead_s),
    ]
