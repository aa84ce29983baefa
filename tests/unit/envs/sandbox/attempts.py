"""Programs that try to get out of a sandbox: each prints "refused" where it fails as it should, else "ESCAPED".

What only the host can see prints "refused" whatever comes of it; the fixture `host` of test_escapes.py looks after it.
"""

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
def escaped_if(happens):
    try:
        print("ESCAPED" if happens() else "refused")
    except OSError:
        print("refused")
def host_looks(work):
    try:
        work()
    except (OSError, ValueError):
        pass
    print("refused")
X86 = os.uname().machine == "x86_64"
def raw(x86, arm, *arguments):
    if libc.syscall(x86 if X86 else arm, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def raw_fork():
    if (pid := libc.syscall(57) if X86 else libc.syscall(220, 17, 0, 0, 0, 0)) < 0:
        raise OSError(ctypes.get_errno(), "fork")
    return pid
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
    "a datagram to an abstract socket": (
        "attempt(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', '\\0$ABSTRACT-datagrams'))"
    ),
    "a message to an abstract socket": (
        "attempt(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)"
        ".sendmsg([b'x'], [], 0, '\\0$ABSTRACT-datagrams'))"
    ),
    "a socket file of the host": "attempt(lambda: socket.socket(socket.AF_UNIX).connect('$SOCKET'))",
    "raw packets": "attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))",
    "a network interface": "escaped_if(lambda: [n for _, n in socket.if_nameindex() if n != 'lo'])",
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
    "the host's temporary files": "escaped_if(lambda: set(os.listdir('/tmp')) - {'attempt.py'})",
    "an open file of the parent": (
        "escaped_if(lambda: [f for f in range(3, 256) if os.path.exists(f'/proc/self/fd/{f}')])"
    ),
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
    "a signal to all": "host_looks(lambda: os.kill(-1, signal.SIGTERM))",
    "a signal by a file's owner": (
        "import fcntl; r, w = os.pipe(); host_looks(lambda: [fcntl.fcntl(r, 8, $VICTIM), fcntl.fcntl(r, 10, 9), "
        "fcntl.fcntl(r, fcntl.F_SETFL, 0o20000), os.write(w, b'x')])"
    ),
    "a signal by a process's file": (
        "attempt(lambda: signal.pidfd_send_signal(os.pidfd_open($VICTIM), signal.SIGKILL))"
    ),
    "a signal with a value": "attempt(lambda: raw(129, 138, $VICTIM, 9, ctypes.create_string_buffer(128)))",
    "a signal to a thread": "attempt(lambda: raw(234, 131, $VICTIM, $VICTIM, 9))",
    "slowing a stranger": "host_looks(lambda: os.setpriority(os.PRIO_PROCESS, $VICTIM, 19))",
    "slowing all of the user": "host_looks(lambda: os.setpriority(os.PRIO_USER, 0, 19))",
    "slowing a stranger's files": "host_looks(lambda: raw(251, 30, 1, $VICTIM, 3 << 13))",
    "pinning a stranger to a core": "host_looks(lambda: os.sched_setaffinity($VICTIM, {0}))",
    "another scheduler for a stranger": (
        "host_looks(lambda: os.sched_setscheduler($VICTIM, os.SCHED_IDLE, os.sched_param(0)))"
    ),
    "tracing what started it": "attempt(lambda: call('ptrace', 16, os.getppid(), None, None))",
    "memory of what started it": "attempt(lambda: open(f'/proc/{os.getppid()}/mem', 'r+b'))",
    "memory of what started it, by a call": (
        "word = ctypes.create_string_buffer(8); "
        "part = (ctypes.c_void_p * 2)(ctypes.addressof(word), 8); "
        "attempt(lambda: call('process_vm_readv', os.getppid(), part, 1, part, 1, 0))"
    ),
    "files of what started it": "attempt(lambda: os.listdir(f'/proc/{os.getppid()}/fd'))",
    "tracing a stranger": "attempt(lambda: call('ptrace', 16, $VICTIM, None, None))",
    "memory of a stranger": "attempt(lambda: open('/proc/$VICTIM/mem', 'rb'))",
    "processes of the host": "escaped_if(lambda: len([p for p in os.listdir('/proc') if p.isdigit()]) > 2)",
    "secrets of the environment": "escaped_if(lambda: '$TOKEN' in str(os.environ) or sees('$TOKEN'))",
    "limits of a stranger": "attempt(lambda: resource.prlimit($VICTIM, resource.RLIMIT_CPU, (1, 1)))",
    "keys of the parent's session": "attempt(lambda: raw(250, 219, 10, -3, b'user', b'$TOKEN', 0))",
    "a key for the next program": "attempt(lambda: raw(248, 217, b'user', b'left', b'x', 1, -4))",
    "shared memory for the next program": "host_looks(lambda: call('shmget', 77, 4096, 0o1777))",
    "a message queue for the next program": "host_looks(lambda: call('msgget', 77, 0o1777))",
    "a program in the kernel": "attempt(lambda: raw(321, 280, 0, None, 0))",
    "a queue of calls to the kernel": "attempt(lambda: raw(425, 425, 1, ctypes.create_string_buffer(120)))",
    "calls by another machine's numbers": "attempt(lambda: raw(0x40000000 + 39, 0x40000000 + 172))",
    "shared memory of the host": "escaped_if(lambda: len(open('/proc/sysvipc/shm').readlines()) > 1)",
    # more rights
    "another user": "attempt(lambda: os.setuid(0 if os.getuid() else 1))",
    "capabilities": "head, data = (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)(); "
    "escaped_if(lambda: libc.capget(head, data) == 0 and any(data))",
    "new rights by setuid files": "escaped_if(lambda: libc.prctl(39, 0, 0, 0, 0) == 0)",
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
    "a fork bomb by the kernel's own call": "attempt(lambda: [raw_fork() or time.sleep(60) for _ in range(100)])",
    "a bomb of threads with small stacks": (
        "threading.stack_size(65536); "
        "attempt(lambda: [threading.Thread(target=time.sleep, args=(60,), daemon=True).start() "
        "for _ in range(400)], RuntimeError); sys.stdout.flush(); os._exit(0)"
    ),
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
    "filling the disk": (
        "for n in range(40): open(f'{n}', 'wb').write(bytes(8 << 20))\ntime.sleep(60)",
        "disk",
    ),
    "endless output": ("while True: os.write(1, b'x' * 65536)", "output"),
    "endless errors": ("while True: os.write(2, b'x' * 65536)", "output"),
    "endless output of a child": ("os.fork()\nwhile True: os.write(1, b'x' * 65536)", "output"),
}
"""Each with the limit that ends it."""
