"""The launcher with real processes, signals and files; ranks and SGLang are fakes."""

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from sdpo_megatron.launch import launcher, supervisor
from sdpo_megatron.launch.launcher import launch, server_process
from sdpo_megatron.models import hub
from sdpo_megatron.preflight.checked import Checked, preflight
from sdpo_megatron.preflight.memory import ServerMemory
from sdpo_megatron.run_dir.export_record import record_export
from tests.unit.launch.launching import Project, running, until

URL = "server.urls=['http://127.0.0.1:9']"
"""Servers of somebody else: the launcher starts none."""
STOPPING = "Stopping ({}): the ranks save and leave. Ctrl-C again, after a second, ends them at once.\n"
RESUMES = "The same command goes on from the newest checkpoint."


def stderr(capfd: pytest.CaptureFixture[str], project: Project) -> str:
    return capfd.readouterr().err.replace(f"{project.path}/", "")


# Ranks


def test_ranks_get_what_torchrun_would_set_and_the_same_arguments(project: Project):
    assert launch(*project.arguments("finish", "finish")) == 0
    facts = [project.facts(rank) for rank in (0, 1)]
    for rank in (0, 1):
        assert facts[rank]["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            # they meet in a file
            "MASTER_ADDR": None,
            "MASTER_PORT": None,
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        assert facts[rank]["arguments"] == [str(project.yaml), "parallel.dp=2"]
        assert facts[rank]["parent"] == os.getpid()
    server = project.server()
    assert server["starts"] == 1 and not running(server["pid"])
    # no rank has taken it
    assert os.listdir(project.run / "servers") == ["0.json"]


def test_a_rank_that_is_killed_ends_all_at_once(project: Project, capfd: pytest.CaptureFixture[str]):
    assert launch(*project.arguments("parent", "killed", "parent")) == 1
    assert stderr(capfd, project) == (
        f"error: rank 1 was ended by SIGKILL (log: runs/x/logs/rank1.log). Where memory runs out the system "
        f"does that (see dmesg). {RESUMES}\n"
    )
    assert not any(running(project.facts(rank)["pid"]) for rank in range(3))
    assert not running(project.server()["pid"])


def test_the_end_of_the_log_of_a_rank_that_crashes(project: Project, capfd: pytest.CaptureFixture[str]):
    assert launch(*project.arguments("defenceless", "crash", overrides=(URL,))) == 1
    assert stderr(capfd, project) == (
        f"error: rank 1 ended with exit code 3 (log: runs/x/logs/rank1.log). {RESUMES}\n"
        "Traceback: something is odd\n"
    )


def test_rank_0_writes_to_the_terminal_and_to_its_log(project: Project, capfd: pytest.CaptureFixture[str]):
    assert launch(*project.arguments("crash", "defenceless", overrides=(URL,))) == 1
    assert stderr(capfd, project) == (
        "Traceback: something is odd\n"
        f"error: rank 0 ended with exit code 3 (log: runs/x/logs/rank0.log). {RESUMES}\n"
    )
    assert (project.run / "logs" / "rank0.log").read_text() == "Traceback: something is odd\n"


def test_only_the_end_of_this_process_is_shown_not_of_an_earlier_one(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    launch(*project.arguments("defenceless", "crash", overrides=(URL,)))
    capfd.readouterr()
    launch(*project.arguments("defenceless", "killed", overrides=(URL,)))
    assert "odd" not in stderr(capfd, project)
    assert "odd" in (project.run / "logs" / "rank1.log").read_text()


@pytest.mark.parametrize(
    ("behaviour", "code", "line"),
    [("user_error", 2, "error: mend this.\n"), ("failed", 1, "stopped: the loss is not finite.\n")],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_says_why_it_ends_is_enough(
    project: Project,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    behaviour: str,
    code: int,
    line: str,
):
    monkeypatch.setattr(supervisor, "ERROR_GRACE_S", 0.3)
    behaviours = ["defenceless", "defenceless"]
    behaviours[rank] = behaviour
    assert launch(*project.arguments(*behaviours, overrides=(URL,))) == code
    assert stderr(capfd, project).removeprefix("noise before\n") == line


def test_ranks_that_fail_together_have_the_time_to_end_and_say_it_once(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    assert launch(*project.arguments("failed_late", "failed", overrides=(URL,))) == 1
    assert stderr(capfd, project) == "stopped: rank 0 says so.\n"


def test_a_reason_is_that_of_this_start_and_of_the_exit_it_was_given_for(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    assert launch(*project.arguments("killed_with_a_reason", "defenceless", overrides=(URL,))) == 1
    assert capfd.readouterr().err.startswith(
        "stopped: not the cause.\nerror: rank 0 was ended by SIGKILL (log: "
    )
    (project.run / "endings" / "rank_0.json").write_text(
        '{"exit_code": 3, "message": "from an earlier start"}'
    )
    assert launch(*project.arguments("crash", "defenceless", overrides=(URL,))) == 1
    assert "error: rank 0 ended with exit code 3 (log: " in capfd.readouterr().err


def test_a_rank_that_lost_another_one_is_not_taken_for_the_cause(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    assert launch(*project.arguments("peer_lost", "crash_late")) == 1
    lines = stderr(capfd, project).splitlines()
    assert lines[0] == "stopped: another rank ended."
    assert lines[1].startswith("error: rank 1 ended with exit code 1 (log: runs/x/logs/rank1.log).")
    assert lines[2] == "Traceback: something is odd"


def test_where_the_lost_rank_is_nowhere_the_loss_is_said(project: Project, capfd: pytest.CaptureFixture[str]):
    assert launch(*project.arguments("finish", "peer_lost")) == 1
    assert stderr(capfd, project) == "stopped: another rank ended.\n"


# The server


def test_a_server_that_ends_is_started_again(project: Project, capfd: pytest.CaptureFixture[str]):
    assert launch(*project.arguments("server_dies")) == 0
    url = project.server()["url"]
    assert f"The server at {url} ended; starting it again.\n" in stderr(capfd, project)


def test_a_server_that_hangs_is_started_again_on_request(project: Project, capfd: pytest.CaptureFixture[str]):
    assert launch(*project.arguments("server_hangs")) == 0
    assert " is stopped, by SIGSTOP or a debugger; starting it again.\n" in stderr(capfd, project)
    assert project.note(0) == "old server gone: True"
    assert project.server()["starts"] == 2


def test_a_server_that_is_killed_is_not_said_to_hang_where_rank_0_notices_first(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    assert launch(*project.arguments("server_killed_and_reported")) == 0
    assert " ended; starting it again.\n" in stderr(capfd, project)


def test_a_request_about_an_earlier_start_lapses(project: Project):
    assert launch(*project.arguments("stale_request")) == 0


def test_what_an_earlier_launcher_left_in_servers_is_forgotten(project: Project):
    assert launch(*project.arguments("finish")) == 0
    (project.run / "servers" / "0.restart").write_text("1\n")
    assert launch(*project.arguments("undisturbed")) == 0


def test_what_does_not_fit_into_memory_starts_nothing(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launcher, "bytes_free", lambda device, server: 1 << 30)
    assert launch(*project.arguments("finish")) == 2
    out = capfd.readouterr()
    assert out.err.startswith(
        "error: model.path does not fit: server and trainer need at least 2.01 GiB (the server's weights 0.00, its "
    )
    assert out.err.count("\n") == 1 and not project.run.exists()
    assert launch(*project.arguments("finish", overrides=("server.memory_fraction=0.5",))) == 0


def test_what_the_server_is_told_of_memory(project: Project, monkeypatch: pytest.MonkeyPatch):
    """All 96 responses of a step at once, 264 tokens each, from config.json and what is free."""
    told: list[ServerMemory] = []

    def make_server(checked: Checked, memory: ServerMemory, log: Path):
        told.append(memory)
        return server_process(checked, memory, log)

    monkeypatch.setattr(launcher, "server_process", make_server)
    assert launch(*project.arguments("finish")) == 0
    assert told == [ServerMemory(fraction=0.95, cache_tokens=96 * 264)]


def test_ranks_and_later_starts_take_the_snapshot_of_the_first(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def download(name: str, revision: str | None, key: str) -> Path:
        asked.append(name)
        return project.path / "model"

    monkeypatch.setattr(hub, "_download", download)
    overrides = ("model.path=owner/name", "model.revision=v1")
    assert launch(*project.arguments("finish", overrides=overrides)) == 0
    kept = json.loads((project.run / "snapshots.json").read_text())
    assert kept == {"owner/name@v1": str(project.path / "model")}
    assert launch(*project.arguments("finish", overrides=overrides)) == 0
    checked = preflight([str(project.yaml), *overrides], world_size=1)
    assert checked.model_directory == project.path / "model"
    assert asked == ["owner/name"]


def test_a_server_that_ends_while_starting(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_SERVER", "dies")
    assert launch(*project.arguments("defenceless", "defenceless")) == 1
    assert stderr(capfd, project) == (
        "error: the SGLang server ended with exit code 1 while starting; the end of its log "
        "runs/x/logs/server0.log:\nloading\nnot enough memory\n"
    )
    assert not any(running(json.loads(path.read_text())["pid"]) for path in project.run.glob("rank*.json"))


def test_a_server_that_does_not_come_up_in_time(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_SERVER", "never")
    assert launch(*project.arguments("defenceless", overrides=("server.start_timeout_s=1.5",))) == 1
    assert stderr(capfd, project) == (
        "error: the SGLang server was not up after server.start_timeout_s=1.5 seconds; the end of its log "
        "runs/x/logs/server0.log:\nstill loading\n"
    )


def test_a_server_that_never_comes_up_again(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_SERVER", f"once:{project.path}/mark")
    assert launch(*project.arguments("server_dies", overrides=("server.max_restarts=1",))) == 1
    first, second, *error = stderr(capfd, project).splitlines()
    assert first.endswith(" ended; starting it again.")
    assert second.endswith(" did not come up again; starting it again.")
    assert error[0].startswith("error: the SGLang server ended with exit code 1 while starting;")
    assert project.server()["starts"] == 3


# Signals to the launcher


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_ranks_save_before_the_server_goes(project: Project, number: signal.Signals):
    process = project.popen("wait", "wait")
    until(lambda: project.note(0) == project.note(1) == "ready")
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)  # as make and timeout may double it
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == STOPPING.format(number.name)
    assert project.note(0) == project.note(1) == "saved after 1; server up: True"
    assert not running(project.server()["pid"])


def test_a_signal_that_ends_the_starting_server_first_is_a_signal_all_the_same(project: Project):
    process = project.popen("wait", FAKE_SERVER="never")
    until(lambda: project.note(0) == "ready")
    os.kill(project.server()["pid"], signal.SIGTERM)
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors == STOPPING.format("SIGTERM")


def test_a_reader_that_stopped_reading_holds_no_signal_up(project: Project):
    """The pipe behind standard error is full, as of a pager or a log collector that hangs."""
    process = project.popen("wait")
    until(lambda: project.note(0) == "ready")
    with open(f"/proc/{process.pid}/fd/2", "wb", buffering=0) as pipe:
        pipe.write(b"x" * fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert str(project.note(0)).startswith("saved after 1")


def test_ctrl_c_in_the_terminal_reaches_only_the_launcher(project: Project):
    process = project.popen("wait")
    until(lambda: project.note(0) == "ready")
    assert (
        os.getpgid(project.facts(0)["pid"]) != os.getpgid(process.pid) != os.getpgid(project.server()["pid"])
    )
    process.terminate()
    process.communicate(timeout=30)


def test_a_second_ctrl_c_ends_ranks_that_do_not_leave(project: Project):
    process = project.popen("stubborn", "stubborn", overrides=(URL,))
    until(lambda: project.note(0) == project.note(1) == "ready")
    process.send_signal(signal.SIGINT)
    with pytest.raises(Exception, match="timed out"):
        process.wait(timeout=1.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors.endswith(f"Ended at once, without saving. {RESUMES}\n")
    assert not any(running(project.facts(rank)["pid"]) for rank in (0, 1))


def test_ranks_that_do_not_leave_in_time_are_ended(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    signals = supervisor.StopSignals.__init__

    def already_asked(self: supervisor.StopSignals) -> None:
        signals(self)
        self.first = signal.SIGTERM

    monkeypatch.setattr(supervisor.StopSignals, "__init__", already_asked)
    monkeypatch.setattr(supervisor.ChildProcess, "ask_to_stop", lambda self: None)
    assert launch(*project.arguments("stubborn", overrides=(URL, "run.stop_grace_s=0.5"))) == 143
    assert stderr(capfd, project).endswith(
        f"The ranks did not leave within run.stop_grace_s=0.5 seconds; ended without saving. {RESUMES}\n"
    )


def test_a_rank_that_cannot_save_tells_in_the_exit_code(project: Project):
    process = project.popen("fail_to_save", "wait", overrides=(URL,))
    until(lambda: project.note(0) == project.note(1) == "ready")
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.endswith("\nstopped: the loss is not finite.\n")


def test_a_rank_that_is_stopped_before_it_can_save_keeps_nobody_waiting(project: Project):
    process = project.popen("defenceless", "stubborn", overrides=(URL,))
    until(lambda: project.note(0) == project.note(1) == "ready")
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 143
    assert errors == STOPPING.format("SIGTERM")


def test_nothing_survives_kill_9_of_the_launcher(project: Project, tmp_path: Path):
    process = project.popen("parent", "parent", FAKE_SERVER=f"parent:{tmp_path}/child")
    notes = [until(lambda rank=rank: project.note(rank)) for rank in (0, 1)]
    servers_child = int(until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text()))
    grandchildren = [int(note.split()[1]) for note in notes] + [servers_child]
    children = [project.facts(rank)["pid"] for rank in (0, 1)] + [project.server()["pid"]]
    assert all(running(pid) for pid in children + grandchildren)
    process.kill()
    process.communicate()
    until(lambda: not any(running(pid) for pid in children + grandchildren), timeout_s=5)


def test_ranks_and_server_die_with_the_launcher_even_without_the_guard(project: Project):
    process = project.popen("defenceless", "defenceless")
    until(lambda: project.note(0) == project.note(1) == "ready")
    children = [project.facts(rank)["pid"] for rank in (0, 1)] + [project.server()["pid"]]
    guard = [pid for pid in children_of(process.pid) if "kill_orphans" in command_line(pid)]
    assert len(guard) == 1
    os.kill(guard[0], signal.SIGKILL)
    until(lambda: not running(guard[0]))
    process.kill()
    process.communicate()
    until(lambda: not any(running(pid) for pid in children), timeout_s=5)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_what_a_rank_leaves_behind_ends_with_it(project: Project):
    process = project.popen("parent", overrides=(URL,))
    child = int(until(lambda: project.note(0)).split()[1])
    os.kill(project.facts(0)["pid"], signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 1
    assert not running(child)


# The run directory


def test_two_launchers_cannot_write_one_run(project: Project, capfd: pytest.CaptureFixture[str]):
    process = project.popen("wait", overrides=(URL,))
    until(lambda: project.note(0) == "ready")
    assert launch(*project.arguments("finish", overrides=(URL,))) == 2
    assert stderr(capfd, project) == (
        f"error: runs/x is in use by process {process.pid}; stop that run first, or choose another "
        "run.name.\n"
    )
    process.kill()
    process.communicate()
    until(lambda: not running(project.facts(0)["pid"]))
    assert launch(*project.arguments("finish", overrides=(URL,))) == 0


def finish_run(project: Project, steps: int) -> None:
    assert launch(*project.arguments("finish", overrides=(URL,))) == 0
    checkpoint = project.run / "checkpoints" / f"{steps:06d}"
    checkpoint.mkdir()
    (checkpoint / "file").touch()
    (checkpoint / "manifest.json").write_text('{"files": {"file": 0}}')
    rows = [f'{{"step": {step}, "env/all/correct": {0.2 + step / 10:.1f}}}\n' for step in range(steps + 1)]
    (project.run / "metrics.jsonl").write_text("".join(rows))


def test_a_finished_run_prints_its_table_and_starts_nothing(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    finish_run(project, 3)
    config = (project.run / "config.json").read_text()
    (project.run / "rank0.json").unlink()
    capfd.readouterr()
    assert launch(*project.arguments("finish", overrides=(URL, "optimizer.lr=1e-4"))) == 0
    output = capfd.readouterr().out.replace(f"{project.path}/", "")
    assert "x is complete: 3 steps." in output
    assert "0.200 (step 0)" in output and "0.500 (step 3)" in output
    assert output.splitlines()[-1] == (
        "A new run: add run.name=ANOTHER_NAME to the command, or remove runs/x. To train on: "
        "run.steps=MORE_THAN_3."
    )
    assert not (project.run / "rank0.json").exists()
    assert (project.run / "config.json").read_text() == config


@pytest.mark.parametrize("missing", ["row", "checkpoint", "steps"])
def test_a_run_that_lacks_something_goes_on(project: Project, missing: str):
    finish_run(project, 3)
    (project.run / "rank0.json").unlink()
    overrides = [URL]
    if missing == "row":
        metrics = project.run / "metrics.jsonl"
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    elif missing == "checkpoint":
        (project.run / "checkpoints" / "000003").rename(project.run / "checkpoints" / "000002")
    else:
        overrides.append("run.steps=4")
    assert launch(*project.arguments("finish", overrides=tuple(overrides))) == 0
    assert (project.run / "rank0.json").exists()


@pytest.mark.parametrize("exported", [None, 2, 3])
def test_an_export_that_is_missing_or_older_is_made(project: Project, exported: int | None):
    finish_run(project, 3)
    (project.run / "rank0.json").unlink()
    if exported is not None:
        (project.run / "hf").mkdir()
        record_export(project.run / "hf", exported, "")
    assert launch(*project.arguments("finish", overrides=(URL, "checkpoint.export_hf=true"))) == 0
    assert (project.run / "rank0.json").exists() == (exported != 3)


def test_fewer_steps_than_the_run_has_behind_it(project: Project, capfd: pytest.CaptureFixture[str]):
    finish_run(project, 3)
    capfd.readouterr()
    assert launch(*project.arguments("finish", overrides=(URL, "run.steps=2"))) == 2
    assert capfd.readouterr().err.replace(f"{project.path}/", "") == (
        "error: run.steps is 2, but runs/x has 3 training steps behind it; set run.steps to at least 3, or choose "
        "another run.name.\n"
    )


def test_a_run_whose_only_checkpoint_is_damaged_is_not_thrown_away(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    finish_run(project, 3)
    rows = (project.run / "metrics.jsonl").read_text()
    (project.run / "checkpoints" / "000003" / "manifest.json").unlink()
    assert launch(*project.arguments("finish", overrides=(URL,))) == 2
    assert "has no whole checkpoint to go on from" in capfd.readouterr().err
    assert (project.run / "metrics.jsonl").read_text() == rows
