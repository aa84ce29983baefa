"""Which sandbox is taken, what is said where none works, and faults that are no outcomes."""

import os
import signal
import tempfile
from typing import ClassVar

import pytest

from sdpo_megatron.envs.sandbox import choice, kept
from sdpo_megatron.envs.sandbox.base import Limits, Outcome, Program, SandboxFault
from sdpo_megatron.envs.sandbox.bubblewrap import Bubblewrap
from sdpo_megatron.envs.sandbox.choice import BACKENDS, Backend, choose
from sdpo_megatron.envs.sandbox.kept import UnsafeSubprocess
from sdpo_megatron.envs.sandbox.sandlock import Sandlock
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.strict_yaml.load import parse
from tests.unit.envs.sandbox.fusion import service


class Leaky:
    name: ClassVar[str] = "leaky"
    python = "python"

    def run(self, program, limits):
        return Outcome(1, None, b"the network is not refused\n", b"", None, 0.1)


def broken():
    raise SandboxFault("bwrap is not installed")


def backend(*ways):
    return Backend(lambda settings: iter(ways), "install the system package bubblewrap")


def test_auto_takes_the_first_that_stands_the_probe():
    sandbox, line = choose(
        SandboxSettings(), {"leaky": backend(Leaky), "bubblewrap": backend(broken, Bubblewrap)}
    )
    assert sandbox.name == "bubblewrap"
    assert "leaky does not work here (the network is not refused)" in line and "\n" not in line


def test_none_that_works_is_refused_with_what_to_install():
    with pytest.raises(UserError, match="bwrap is not installed.*install the system package bubblewrap"):
        choose(SandboxSettings(), {"bubblewrap": backend(broken)})


def test_auto_never_takes_what_confines_nothing():
    assert not BACKENDS["unsafe_subprocess"].by_itself
    with pytest.raises(UserError) as refused:
        choose(SandboxSettings(), {"unsafe_subprocess": BACKENDS["unsafe_subprocess"]})
    assert "unsafe" not in str(refused.value)


def test_a_sandbox_that_is_spelled_out():
    for name, said in (("sandlock", "whole policy"), ("unsafe_subprocess", "confines nothing")):
        sandbox, line = choose(SandboxSettings.model_validate({"backend": name}))
        assert sandbox.name == name and line.startswith(f"Sandbox: {name}, with /") and said in line


def test_auto_takes_a_service_where_nothing_else_works(monkeypatch):
    with service() as url:
        both = {"bubblewrap": backend(broken), "http": BACKENDS["http"]}
        sandbox, line = choose(SandboxSettings(url=url), both)
        assert sandbox.name == "http" and "the service's promise" in line
        with pytest.raises(UserError, match="set sandbox.url to a service"):
            choose(SandboxSettings(), both)


@pytest.mark.parametrize("kind", ["bubblewrap", "sandlock"])
def test_the_probe_finds_what_a_policy_lets_through(monkeypatch, kind):
    sandbox = choose(SandboxSettings.model_validate({"backend": kind}))[0]
    assert choice.probe(sandbox, BACKENDS[kind].probe) == ""
    unsafe = choose(SandboxSettings(backend="unsafe_subprocess"))[0]
    assert choice.probe(unsafe, BACKENDS[kind].probe).endswith("is not refused")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "bublewrap"}, "x.backend is 'bublewrap'.*must be 'auto', 'bubblewrap'"),
        ({"backend": "http"}, "needs the service's address: set task.options.sandbox.url"),
        ({"backend": "sandlock", "url": "http://x"}, "url is of backend http"),
        ({"url": "localhost:80"}, "must begin with http://"),
        ({"memory_mib": 0}, "must be greater than 0"),
    ],
)
def test_impossible_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(SandboxSettings, values, {}, "x")


def test_a_sandbox_that_does_not_start_is_a_fault():
    with pytest.raises(SandboxFault, match="ran no program.*/not/there"):
        Bubblewrap(shown=["/not/there"]).run(Program(["python", "-c", ""]), Limits())
    with pytest.raises(SandboxFault, match="unexpected keyword"):
        sandbox = Sandlock()
        sandbox.policy["sandlock"]["no_such_setting"] = 1
        sandbox.run(Program(["python", "-c", ""]), Limits())


def test_a_keeper_that_is_killed_is_a_fault_and_the_next_program_runs():
    sandbox = choose(SandboxSettings(backend="sandlock"))[0]
    assert isinstance(sandbox, Sandlock)
    [keeper] = sandbox._idle
    keeper._process.kill()
    with pytest.raises(SandboxFault, match="keeper ended"):
        sandbox.run(Program(["python", "-c", ""]), Limits())
    assert keeper._folder is not None and not keeper._folder.exists()
    assert sandbox.run(Program(["python", "-c", ""]), Limits()).exit_code == 0


def test_bubblewrap_needs_no_place_on_the_disk(tmp_path, monkeypatch):
    """Root's programs are another user's, who may not enter a temporary directory of root's own."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sandbox = Bubblewrap()
    outcome = sandbox.run(Program(["python", "f.py"], files={"f.py": b"print(1)"}), Limits())
    assert (outcome.exit_code, outcome.stdout_bytes) == (0, b"1\n")
    assert list(tmp_path.iterdir()) == []


def test_a_keeper_that_cannot_have_its_place_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(SandboxFault, match="does not start"):
        UnsafeSubprocess().run(Program(["python", "-c", ""]), Limits())


@pytest.mark.parametrize("kind", [Bubblewrap, Sandlock, UnsafeSubprocess])
def test_programs_begin_with_every_signals_own_effect(kind):
    """Python ignores these two, and what it starts would inherit that."""
    for name, number in (("PIPE", signal.SIGPIPE), ("XFSZ", signal.SIGXFSZ)):
        outcome = kind().run(Program(["/bin/sh", "-c", f"kill -{name} $$; echo lives"]), Limits())
        assert (outcome.signal, outcome.stdout_bytes) == (number, b""), outcome


def test_a_keeper_that_says_nothing_is_a_fault(monkeypatch):
    monkeypatch.setattr(kept, "GONE_WITHIN_S", 0.2)
    sandbox = Sandlock()
    keeper = sandbox._borrow()
    os.kill(keeper._process.pid, 19)  # SIGSTOP
    sandbox._idle.append(keeper)
    with pytest.raises(SandboxFault, match="no answer"):
        sandbox.run(Program(["python", "-c", ""]), Limits(wall_s=0.1))
    assert keeper._process.poll() is not None


@pytest.mark.parametrize("kind", [Bubblewrap, Sandlock])
def test_an_input_of_megabytes_arrives_in_seconds(kind):
    program = Program(
        ["python", "-c", "import sys; print(len(sys.stdin.buffer.read()))"], {}, b"x" * (64 << 20)
    )
    assert kind().run(program, Limits(wall_s=20)).stdout_bytes == b"67108864\n"


def test_a_forked_process_has_keepers_of_its_own():
    sandbox = Sandlock()
    assert sandbox.run(Program(["python", "-c", ""]), Limits()).exit_code == 0
    [mine] = sandbox._idle
    child = os.fork()
    if child == 0:
        sandbox.run(Program(["python", "-c", ""]), Limits())
        os._exit(mine in sandbox._idle)
    # others of this process may end meanwhile
    assert os.waitpid(child, 0)[1] == 0
    assert sandbox._idle == [mine]


@pytest.mark.parametrize("name", ["/x", "../x", "a/../../x", ""])
def test_a_file_outside_the_working_directory(name):
    with pytest.raises(ValueError, match="below the working directory"):
        Program(["python"], {name: b""})
