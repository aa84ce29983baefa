"""Which sandbox is taken, what is said where none works, and faults that are no outcomes."""

from typing import ClassVar

import pytest

from sdpo_megatron.envs.sandbox.base import Limits, Outcome, Program, SandboxFault
from sdpo_megatron.envs.sandbox.bubblewrap import Bubblewrap
from sdpo_megatron.envs.sandbox.choice import choose
from sdpo_megatron.errors import ConfigError, UserError


class Leaky:
    name: ClassVar[str] = "leaky"
    python = "python"

    def run(self, program, limits):
        return Outcome(1, None, b"the network is not refused\n", b"", None, 0.1)


def broken():
    raise SandboxFault("bwrap is not installed")


def test_auto_takes_the_first_that_stands_the_probe():
    sandbox, line = choose(
        "auto", {"leaky": lambda: iter([Leaky]), "bubblewrap": lambda: iter([broken, Bubblewrap])}
    )
    assert sandbox.name == "bubblewrap"
    assert "leaky does not work here (the network is not refused)" in line and "\n" not in line


def test_none_that_works_is_refused_with_what_to_install():
    with pytest.raises(UserError, match="bwrap is not installed.*install the system package bubblewrap"):
        choose("auto", {"bubblewrap": lambda: iter([broken])})


def test_an_unknown_name():
    with pytest.raises(ConfigError, match="Did you mean 'bubblewrap'"):
        choose("bublewrap")


def test_a_sandbox_that_does_not_start_is_a_fault():
    with pytest.raises(SandboxFault, match="ran no program.*/not/there"):
        Bubblewrap(shown=["/not/there"]).run(Program(["python", "-c", ""]), Limits())


@pytest.mark.parametrize("name", ["/x", "../x", "a/../../x", ""])
def test_a_file_outside_the_working_directory(name):
    with pytest.raises(ValueError, match="below the working directory"):
        Program(["python"], {name: b""})


def test_impossible_limits():
    with pytest.raises(ValueError, match="wall_s is 0"):
        Limits(wall_s=0)
