"""Programs that try to get out of a sandbox: each prints "refused" where it fails as it should, else "ESCAPED"."""

PRELUDE = """
import ctypes, errno, os, pathlib, resource, signal, socket, subprocess, sys, threading, time
def attempt(work, *expected):
    try:
        work()
    except expected or OSError:
        print("refused")
    else:
        print("ESCAPED")
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
def escaped_if(happened):
    print("ESCAPED" if happened else "refused")
def sees(text):
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                if process.name != str(os.getpid()) and text.encode() in (process / name).read_bytes():
                    return True
            except OSError:
                pass
    return False
"""

# $NAME stands for something of the host: see `host` in test_escapes.py
SIMPLE: dict[str, str] = {
    # network
    "TCP to a port of this machine": "attempt(lambda: socket.create_connection(('127.0.0.1', $PORT), 2))",
    "TCP to the world": "attempt(lambda: socket.create_connection(('198.51.100.1', 80), 2))",
    "UDP to the world": "attempt(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.1', 53)))",
    "TCP over IPv6": "attempt(lambda: socket.create_connection(('2001:db8::1', 80), 2))",
    "a name lookup": "attempt(lambda: socket.getaddrinfo('example.com', 80))",
    "an abstract socket of the host": "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0$ABSTRACT'))",
    "a socket file of the host": "attempt(lambda: socket.socket(socket.AF_UNIX).connect('$SOCKET'))",
    "raw packets": "attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))",
    "a network interface": "escaped_if([n for _, n in socket.if_nameindex() if n != 'lo'])",
    # files
    "a secret file": "attempt(lambda: open('$SECRET').read())",
    "a secret file by a symlink": "os.symlink('$SECRET', 'link'); attempt(lambda: open('link').read())",
    "a secret file by a hard link": "attempt(lambda: os.link('$SECRET', 'link'))",
    "a secret file by dots": "attempt(lambda: open('../../../..$SECRET').read())",
    "a secret file by another root": "attempt(lambda: open('/proc/1/root$SECRET').read())",
    "the old root of pivot_root": "attempt(lambda: os.listdir('/oldroot'))",
    "home": "attempt(lambda: os.listdir('$HOME'))",
    "the tests and expected outputs": "attempt(lambda: os.listdir('$REPOSITORY'))",
    "password hashes": "attempt(lambda: open('/etc/shadow').read())",
    "names of users": "attempt(lambda: open('/etc/passwd').read())",
    "the host's temporary files": "escaped_if(set(os.listdir('/tmp')) - {'attempt.py'})",
    "an open file of the parent": "escaped_if([f for f in range(3, 256) if os.path.exists(f'/proc/self/fd/{f}')])",
    "writing to the system": "attempt(lambda: open('/usr/lib/x', 'w'))",
    "writing to the root": "attempt(lambda: open('/x', 'w'))",
    "writing to /dev": "attempt(lambda: open('/dev/x', 'w'))",
    "writing through a mount made writable": (
        "attempt(lambda: call('mount', b'none', b'/usr', None, 0x1020, None))"  # remount, bind
    ),
    "unmounting what hides": "attempt(lambda: call('umount2', b'/tmp', 2))",
    "a mount of one's own": "attempt(lambda: call('mount', b'proc', b'/tmp', b'proc', 0, None))",
    "a chroot": "attempt(lambda: os.chroot('/tmp'))",
    "a device": "attempt(lambda: os.mknod('/tmp/disk', 0o60600, os.makedev(254, 0)))",
    "kernel settings": "attempt(lambda: open('/proc/sys/kernel/core_pattern', 'w'))",
    "the system request key": "attempt(lambda: open('/proc/sysrq-trigger', 'w'))",
    "kernel memory": "attempt(lambda: open('/proc/kcore', 'rb'))",
    # other processes
    "a signal to the parent": "attempt(lambda: os.kill($PARENT, signal.SIGTERM))",
    "a signal to a stranger of the same user": "attempt(lambda: os.kill($VICTIM, signal.SIGKILL))",
    "tracing a stranger": "attempt(lambda: call('ptrace', 16, $VICTIM, None, None))",
    "memory of a stranger": "attempt(lambda: open('/proc/$VICTIM/mem', 'rb'))",
    "processes of the host": "escaped_if(len([p for p in os.listdir('/proc') if p.isdigit()]) > 2)",
    "secrets of the environment": "escaped_if('$TOKEN' in str(os.environ) or sees('$TOKEN'))",
    "limits of a stranger": "attempt(lambda: resource.prlimit($VICTIM, resource.RLIMIT_CPU, (1, 1)))",
    "shared memory of the host": "escaped_if(len(open('/proc/sysvipc/shm').readlines()) > 1)",
    # more rights
    "another user": "attempt(lambda: os.setuid(0))",
    "capabilities": "escaped_if('CapEff:\\t0000000000000000' not in open('/proc/self/status').read())",
    "new rights by setuid files": "escaped_if('NoNewPrivs:\\t1' not in open('/proc/self/status').read())",
    "a user namespace of one's own": "attempt(lambda: call('unshare', 0x10000000))",
    "a name space of mounts": "attempt(lambda: call('unshare', 0x20000))",
    "the host's name": "attempt(lambda: socket.sethostname('x'))",
    "the clock": "attempt(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))",
    "a higher priority": "attempt(lambda: os.nice(-5))",
    "a controlling terminal": "attempt(lambda: open('/dev/tty'))",
    # limits
    "lifting a limit": (
        "attempt(lambda: resource.setrlimit(resource.RLIMIT_CPU, (-1, -1)), ValueError, OSError)"
    ),
    "more memory": "attempt(lambda: bytearray(2 << 30), MemoryError)",
    "a file that is too large": "attempt(lambda: open('x', 'wb').write(bytes(17 << 20)))",
    "many files that fill the memory": (
        "attempt(lambda: [pathlib.Path(f'/dev/shm/{n}').write_bytes(bytes(8 << 20)) for n in range(9)])"
    ),
    "many open files": "attempt(lambda: [os.dup(1) for _ in range(1000)])",
    "a fork bomb": "attempt(lambda: [os.fork() or time.sleep(60) for _ in range(100)])",
    "a bomb of threads": (
        "attempt(lambda: [threading.Thread(target=time.sleep, args=(60,), daemon=True).start() "
        "for _ in range(100)], RuntimeError); sys.stdout.flush(); os._exit(0)"
    ),
}

RUNAWAY: dict[str, tuple[str, str]] = {
    "computing for ever": ("while True: pass", "cpu"),
    "computing for ever, deaf to the signal": (
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "cpu",
    ),
    "sleeping past the limit": ("time.sleep(60)", "wall"),
    "sleeping with closed streams": ("os.close(0); os.close(1); os.close(2); time.sleep(60)", "wall"),
    "sleeping, deaf to all signals": (
        "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(60)",
        "wall",
    ),
    "stopping itself": ("os.kill(os.getpid(), signal.SIGSTOP)", "wall"),
    "a session of its own": ("os.fork() and time.sleep(60)\nos.setsid(); time.sleep(60)", "wall"),
    "endless output": ("while True: os.write(1, b'x' * 65536)", "output"),
    "endless errors": ("while True: os.write(2, b'x' * 65536)", "output"),
    "endless output of a child": ("os.fork()\nwhile True: os.write(1, b'x' * 65536)", "output"),
}
"""Each with the limit that ends it."""
