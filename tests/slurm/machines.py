"""The machines of the cluster, each in namespaces of its own inside of one machine that has all of it.

The *control* machine has the controller, the bridge that all links end in, and a process namespace that the nodes'
are inside of. When its first process ends, the kernel ends all others and removes all interfaces and mounts: nothing
of a cluster outlives it, however its user ended.
"""

import os
import subprocess
from pathlib import Path

import psutil

from sdpo_megatron.launch.processes import wait_until
from tests.slurm.slurm_conf import CONTROLLER, CONTROLLER_ADDRESS, LOGIN_ADDRESS, address, hardware_address

STAND_INS = Path(__file__).parent / "bin"
UNSHARE = ("unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child")
HOST_LINK = "slurm-login"
"""The one thing outside of the namespaces: this machine's end of its link to the bridge."""

# Arguments: root, name, address with prefix length.
CONTROL_SCRIPT = """
set -eu
root=$1
hostname "$2"
mount --bind "$root/etc/hosts" /etc/hosts
mount --bind "$root/etc/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
ip link add bridge type bridge
ip address add "$3" dev bridge
ip link set bridge up
# forced, since its socket lies in a directory that is closed to other users
munged --foreground --force --num-threads=2 --key-file="$root/etc/munge.key" --socket="$root/run/munge" \
    --pid-file="$root/run/munged.pid" --log-file="$root/log/munged.log" --seed-file="$root/run/munge.seed" &
until [ -S "$root/run/munge" ]; do sleep 0.02; done
slurmctld -D -c &
wait -n
"""

# Arguments: root, name, address with prefix length, and the paths that are the same on all machines.
NODE_SCRIPT = """
set -eu
root=$1 name=$2 address=$3
shift 3
hostname "$name"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$root/local"
mkdir -m 1777 "$root/local/tmp"
for path; do
    case $path in /tmp/*) mkdir -p "$root/local$path" && mount --bind "$path" "$root/local$path" ;; esac
done
mount --rbind "$root/local/tmp" /tmp
# Slurm finds no cgroups, whatever this machine has.
if [ -d /sys/fs/cgroup ]; then mount -t tmpfs tmpfs /sys/fs/cgroup; fi
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up
slurmd -D &
wait $!
"""


class MachineError(Exception):
    """A machine of the cluster did not start."""


def start_control(root: Path, lock: int, *, dies_with_caller: bool) -> int:
    """Starts the control machine and links this machine to it. Returns the number of its first process. `lock` is an
    open file that the machine keeps open as long as it lives."""
    command = [
        *UNSHARE,
        "bash",
        "-c",
        CONTROL_SCRIPT,
        "control",
        str(root),
        CONTROLLER,
        f"{CONTROLLER_ADDRESS}/24",
    ]
    if dies_with_caller:
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    first = _start(command, root, "control", depth=1, pass_fds=(lock,))
    try:
        # One that died a moment ago may not have been removed yet.
        subprocess.run(["ip", "link", "delete", HOST_LINK], capture_output=True)
        shown = ["nsenter", f"--target={first}", "--net", "ip", "link", "show", "bridge", "up"]
        if not wait_until(lambda: bool(subprocess.run(shown, capture_output=True).stdout), 20.0):
            raise MachineError(f"the control machine made no bridge: {said(root, 'control')}")
        _ip("link", "add", HOST_LINK, "type", "veth", "peer", "name", "login", "netns", str(first))
        _ip("address", "add", f"{LOGIN_ADDRESS}/24", "dev", HOST_LINK)
        _ip("link", "set", HOST_LINK, "up")
        _ip("link", "set", "login", "master", "bridge", "up", inside=first)
    except BaseException:
        kill(first)
        raise
    return first


def start_node(root: Path, control: int, name: str, shared: list[Path]) -> int:
    """Starts a node with a link to the bridge. Returns the number of its first process."""
    command = [
        "nsenter",
        f"--target={control}",
        "--pid",
        "--mount",
        *UNSHARE,
        "bash",
        "-c",
        NODE_SCRIPT,
        "node",
    ]
    command += [str(root), name, f"{address(name)}/24", *map(str, shared)]
    first = _start(command, root, name, depth=2)
    # the link of one that died a moment ago
    subprocess.run(
        ["nsenter", f"--target={control}", "--net", "ip", "link", "delete", name], capture_output=True
    )
    # The same after a restart: the others remember it for a minute.
    peer = ["peer", "name", "eth0", "address", hardware_address(name), "netns", str(first)]
    _ip("link", "add", name, "type", "veth", *peer, inside=control)
    _ip("link", "set", name, "master", "bridge", "up", inside=control)
    return first


def set_link(control: int, name: str, up: bool) -> None:
    """Connects a node to the bridge, or cuts it off."""
    _ip("link", "set", name, "up" if up else "down", inside=control)


def kill(first: int) -> None:
    """Ends a machine by its first process, with all that runs on it, and waits until it is gone."""
    try:
        process = psutil.Process(first)
        process.kill()
        process.wait(timeout=20)
    except psutil.NoSuchProcess:
        return


def said(root: Path, name: str) -> str:
    """The last lines of what a machine's first process wrote."""
    return "\n".join((root / f"log/{name}.out").read_text(errors="replace").splitlines()[-10:])


_started: list[subprocess.Popen[bytes]] = []
"""Kept, so that Python reaps them when it starts the next."""


def _start(command: list[str], root: Path, name: str, depth: int, pass_fds: tuple[int, ...] = ()) -> int:
    """Returns the number of the process that is `depth` generations below the command, once it is there."""
    with open(root / f"log/{name}.out", "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(root),
            cwd="/",
            start_new_session=True,
            pass_fds=pass_fds,
        )
    _started.append(process)
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = [psutil.Process(process.pid)]
        for _ in range(depth):
            found[:] = found[0].children()
            if not found:
                return process.poll() is not None
        return True

    if not wait_until(there, 20.0) or not found:
        process.kill()
        raise MachineError(f"{name} did not start: {said(root, name)}")
    return found[0].pid


def environment(root: Path) -> dict[str, str]:
    """What the cluster's programs, and those that use it, have in their environment: also a stand-in of sacct."""
    path = os.environ["PATH"].split(":")
    return os.environ | {
        "SLURM_CONF": f"{root}/etc/slurm.conf",
        "PATH": ":".join(
            [str(STAND_INS), *(part for part in path if part != str(STAND_INS)), "/usr/sbin", "/sbin"]
        ),
    }


def _ip(*arguments: str, inside: int | None = None) -> None:
    enter = [] if inside is None else ["nsenter", f"--target={inside}", "--net"]
    done = subprocess.run([*enter, "ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
