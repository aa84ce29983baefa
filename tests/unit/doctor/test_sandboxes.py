"""Which sandbox a task would take here."""

import sys
from types import SimpleNamespace

import pytest

from sdpo_megatron.doctor import sandboxes as module
from sdpo_megatron.doctor.asking import Answer
from sdpo_megatron.doctor.sandboxes import landlock_level, sandbox, user_namespaces
from sdpo_megatron.envs.sandbox.choice import choose
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from sdpo_megatron.errors import UserError


def test_this_machines():
    (finding,) = sandbox()
    chosen, _ = choose(SandboxSettings())
    assert finding.status == "ok" and finding.figures["sandbox"] == chosen.name
    assert finding.found.startswith(f"{chosen.name}, with /")
    assert f"user namespaces: {user_namespaces()}; Landlock: {landlock_level()}" in finding.found


def test_none_is_a_warning_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def refuses(settings):
        raise UserError(
            "No sandbox for programs that the model writes: bubblewrap does not work here (bwrap is not installed). "
            "To have one, install the system package bubblewrap."
        )

    monkeypatch.setattr(module, "choose", refuses)
    (finding,) = sandbox()
    assert finding.status == "warning"
    assert "(bwrap is not installed); user namespaces: " in finding.found
    assert finding.todo == (
        "for tasks that run programs (python_tests), install the system package bubblewrap."
    )


def test_why_there_are_no_user_namespaces(monkeypatch: pytest.MonkeyPatch):
    answer = Answer(exit_code=1, output="", errors="No space left on device\n")
    monkeypatch.setattr(module, "ask", lambda *arguments: answer)
    assert user_namespaces() == "no (No space left on device)"


def test_landlock(monkeypatch: pytest.MonkeyPatch):
    assert landlock_level().startswith(("version ", "none"))
    for level, said in ((0, "none"), (6, "version 6")):
        monkeypatch.setitem(
            sys.modules,
            "sandlock",
            SimpleNamespace(landlock_abi_version=lambda level=level: level, __spec__=1),
        )
        assert landlock_level() == said
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert landlock_level() == "not known (sandlock is not installed)"
