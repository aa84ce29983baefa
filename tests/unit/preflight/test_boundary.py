"""Whatever fails in reading what a user gave ends in one line, and hangs nowhere."""

import os
import re
import threading
import time
from pathlib import Path

import pytest

from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.preflight import boundary
from sdpo_megatron.preflight.boundary import LONGEST_REASON, reading, reason
from sdpo_megatron.train import main
from tests.unit.launch.launching import Project, make_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], project: Project, *arguments: str) -> str:
    """The one line, without the project's path."""
    began = time.monotonic()
    assert main([str(project.yaml), "--check", *arguments]) == 2
    assert time.monotonic() - began < 10
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and len(said.err) < 1000
    return said.err.strip().replace(f"{project.path}/", "")


def test_an_exception_that_nobody_foresaw_is_one_line_and_its_traceback_a_file():
    with pytest.raises(UserError) as caught, reading("model.path=x"):
        raise KeyError("first\nsecond" + "x" * 1000)
    line = str(caught.value)
    found = re.fullmatch(
        r"Reading model.path=x failed \(KeyError: (.*)\); correct that. Its .* in (.*)\.", line
    )
    assert found and len(found[1]) <= LONGEST_REASON and caught.value.__cause__ is None
    kept = Path(found[2])
    assert 'raise KeyError("first' in kept.read_text() and kept.stat().st_mode & 0o777 == 0o600
    kept.unlink()


def test_a_first_line_that_leads_to_the_second_is_shown_with_it():
    assert (
        reason(TypeError("Field 'eps':\n   expected float\nmore")) == "TypeError: Field 'eps': expected float"
    )
    assert reason(TypeError("Field 'eps':")) == "TypeError: Field 'eps':"
    assert reason(TypeError()) == "TypeError"


def test_foreseen_mistakes_keep_their_line():
    with pytest.raises(ConfigError, match="^write 2$"), reading("x"), reading("y"):
        raise ConfigError("write 2")
    with pytest.raises(UserError, match="^/none cannot be used: No such file or directory; "), reading("x"):
        open("/none")
    with pytest.raises(KeyboardInterrupt), reading("x"):
        raise KeyboardInterrupt


def test_a_limit_ends_what_takes_longer_and_nothing_after_it():
    def endless() -> None:
        while True:
            # code that is read may catch all it can
            try:
                time.sleep(0.01)
            except Exception:
                pass

    with pytest.raises(UserError, match="^Reading it takes more than 0.1 s; "), reading("it", 0.1):
        endless()
    with reading("it", 0.1):
        pass
    time.sleep(0.2)
    seen: list[str] = []

    def in_a_thread() -> None:
        with reading("it", 0.1):
            seen.append("read")

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen == ["read"]


def test_what_takes_long_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(boundary, "ANNOUNCED_EVERY_S", 0.05)
    lines: list[str] = []
    with reading("it", announce=lines.append):
        time.sleep(0.3)
    said = len(lines)
    time.sleep(0.1)
    assert 2 <= said == len(lines) and lines[0] == "Still reading it, for 0 s now"


def test_check_ends_after_the_preflight(project: Project, capsys: pytest.CaptureFixture[str]):
    assert main([str(project.yaml), "--check"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{project.run} can be started: everything is in order.\n" and said.err == ""
    assert not project.run.exists()


def test_check_looks_at_memory_too(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sdpo_megatron.launch.launcher.bytes_free", lambda *arguments: 1 << 20)
    assert "GiB" in refused(capsys, project)


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (ALIASES, "s.yaml comes to more than 100,000 keys and values; remove its aliases."),
        ("run: &a {dir: *a}", "s.yaml comes to more than 100,000 keys and values; remove its aliases."),
        (
            "a" * 1_000_001,
            "s.yaml has more than 1,000,000 bytes, the most that such a file may have; correct it.",
        ),
        ("".join(f"k{k}: 1\n" for k in range(90_000)), "s.yaml comes to more than 100,000 keys"),
        ("[" * 100_000, "s.yaml: not valid YAML: maximum recursion depth exceeded"),
    ],
    ids=["aliases", "an alias of itself", "large", "many keys", "brackets"],
)
def test_settings_that_take_for_ever(
    project: Project, capsys: pytest.CaptureFixture[str], text: str, line: str
):
    (project.path / "s.yaml").write_text(text)
    # on a slow machine whatever is large ends so
    slow = "error: Reading the settings takes more than 5 s; "
    assert refused(capsys, project, str(project.path / "s.yaml")).startswith((f"error: {line}", slow))


NO_FILE = " is no regular file, but a device, pipe or socket; give a file."


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{fifo}"], f"fifo{NO_FILE}"),
        (["/dev/zero"], f"/dev/zero{NO_FILE}"),
        (["task={{env: jsonl, options: {{train_file: {fifo}}}}}"], f"fifo{NO_FILE}"),
        (["a." * 1000 + "a=1"], f"'{'a.' * 38}... is 1001 levels deep, but no setting is; correct its key."),
        (
            ["run.dir=~nosuchuser/x"],
            "run.dir: there is no user nosuchuser, with whose home ~nosuchuser/x begins; correct it.",
        ),
        (
            ["model.path=~nosuchuser/x"],
            "model.path: there is no user nosuchuser, with whose home ~nosuchuser/x begins; correct it.",
        ),
        (
            ["task={{env: jsonl, options: {{train_file: ~nosuchuser/x}}}}"],
            "task.options: there is no user nosuchuser, with whose home ~nosuchuser/x begins; correct it.",
        ),
        (
            ["server.urls=[http://10.0.0.256:30000]"],
            "server.urls holds 'http://10.0.0.256:30000'; write it as http://HOST:PORT.",
        ),
        (
            ["server.host=nosuch.invalid"],
            "server.host is 'nosuch.invalid', which is no address or name known here; set server.host=127.0.0.1.",
        ),
        (
            ["server.host=10.0.0.256"],
            "server.host is '10.0.0.256', which is no address or name known here; set server.host=127.0.0.1.",
        ),
        (
            ["optimizer.lr=" + "9" * 400],
            f"optimizer.lr is {'9' * 77}... (whole number, from the command line); it must",
        ),
        (["x" * 300 + ".yaml"], "x" * 300),
        (["run.name=" + "[" * 3000], f"'run.name={'[' * 67}...: not valid YAML: maximum recursion depth"),
        (
            ["task.options.train_size=2147483647"],
            "task.options.train_size is 2147483647 (whole number, from the command line); it must be at most 1000000.",
        ),
        (["--chek"], "unknown option --chek; settings are written section.key=value, see --help."),
    ],
)
def test_a_command_line(
    project: Project, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
):
    os.mkfifo(project.path / "fifo")
    given = [argument.format(fifo=project.path / "fifo") for argument in arguments]
    assert refused(capsys, project, *given).startswith(f"error: {line}")


def test_numbers_and_brackets_in_a_model_directory(project: Project, capsys: pytest.CaptureFixture[str]):
    config = project.path / "model" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace("{", '{"rope_theta": ' + "9" * 400 + ", ", 1))
    said = refused(capsys, project)
    assert said == f"error: model/config.json: rope_theta is {'9' * 77}...; it must be a positive number."
    config.write_text(whole)
    (project.path / "model" / "model.safetensors").unlink()
    (project.path / "model" / "model.safetensors.index.json").write_text("[" * 100_000)
    said = refused(capsys, project)
    assert said.startswith("error: model/model.safetensors.index.json is damaged: it must hold a JSON object")


def test_a_model_that_a_server_would_not_find(project: Project, capsys: pytest.CaptureFixture[str]):
    (project.path / "model").rename(project.path / "model[1]")
    said = refused(capsys, project, f"model.path={project.path}/model[1]")
    assert said.startswith("error: SGLang cannot read a model in model[1]: it takes a path with [")
