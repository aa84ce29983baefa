import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.losses.base import Loss
from sdpo_megatron.algorithm.reprompt import RepromptSettings
from sdpo_megatron.config import (
    Config,
    EvalSettings,
    LogSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RolloutSettings,
    RunSettings,
    ServerSettings,
    TaskSettings,
    TeacherSettings,
)
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.equations import Equations
from sdpo_megatron.envs.jsonl import JsonlProblems
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.files import write_private
from sdpo_megatron.models.shape import Experts, ModelShape, read_model_shape
from sdpo_megatron.preflight import settings as checks
from sdpo_megatron.preflight.server import are_on_loopback, read_api_key
from tests.loss_settings import loss_settings
from tests.sparse_weights import write_weights
from tests.unit.launch.launching import write_model

SMOLLM2 = ModelShape(
    architecture="LlamaForCausalLM",
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    hidden=576,
    ffn=1536,
    vocab=49152,
    tie_embeddings=True,
    rope_theta=1e5,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    max_positions=8192,
    eos_ids=(2,),
)


def loss_of(name: str = "divergence", **values: Any) -> Loss:
    return build_terms(loss_settings(name, **values))[0].loss


def refused(check, *arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", ["cp", "ep", "vpp"])
def test_sizes_that_do_not_work_yet_are_refused_by_name(key: str):
    checks.check_parallel(ParallelSettings())
    message = refused(checks.check_parallel, ParallelSettings.model_validate({key: 2}))
    assert message == f"parallel.{key} is 2, which is not supported yet; set parallel.{key}=1."


def test_sequence_parallel_needs_tp():
    checks.check_parallel(ParallelSettings(tp=3, sequence_parallel=True))
    assert refused(checks.check_parallel, ParallelSettings(sequence_parallel=True)) == (
        "parallel.sequence_parallel is on with parallel.tp=1, where there is nothing to split; "
        "set parallel.sequence_parallel=false or a larger parallel.tp."
    )


class OwnWords(Equations):
    pass


@pytest.mark.parametrize(("env", "refuses"), [(OwnWords, True), (JsonlProblems, False)])
def test_words_for_an_environment_that_has_its_own(env: type[Environment], refuses: bool):
    task, made = TaskSettings(env="mine"), env.__new__(env)
    chosen = {
        "run.name": "command line",
        "reprompt.template.closing": "x.yaml",
        "reprompt.feedback": "x.yaml",
    }
    unchosen = {"reprompt.template.closing": "default", "reprompt.template.layout": "reprompt.preset"}
    checks.check_template(made, task, unchosen)
    if not refuses:
        checks.check_template(made, task, chosen)
        return
    with pytest.raises(ConfigError) as refused:
        checks.check_template(made, task, chosen)
    assert refused.value.message == (
        "reprompt.template.closing is set, but task.env=mine shows its problems to the teacher in its own words (its "
        "`show`); remove it."
    )


def test_world_size():
    checks.check_world_size(ParallelSettings(tp=3, pp=2, dp=2), 12)
    assert refused(checks.check_world_size, ParallelSettings(tp=3, pp=2), 4) == (
        "The number of ranks that were started is 4, but parallel.tp * pp * cp * dp = 3 * 2 * 1 * 1 = 6; start 6 ranks."
    )


def test_tp_must_divide_heads():
    checks.check_layout(ParallelSettings(tp=3, pp=2), SMOLLM2)
    assert refused(checks.check_layout, ParallelSettings(tp=2), SMOLLM2) == (
        "parallel.tp=2 does not divide the model's 9 attention heads; set parallel.tp to 1 or 3."
    )
    assert refused(checks.check_layout, ParallelSettings(tp=9), SMOLLM2) == (
        "parallel.tp=9 does not divide the model's 3 key-value heads; set parallel.tp to 1 or 3."
    )
    odd = replace(SMOLLM2, heads=8, kv_heads=4, vocab=151_667)
    checks.check_layout(ParallelSettings(tp=2), odd)  # the vocabulary is padded


def test_experts_are_cut_and_need_the_sequence_split():
    mixed = replace(SMOLLM2, experts=Experts(count=8, chosen=2, ffn=100, normalised=True))
    checks.check_layout(ParallelSettings(pp=2), mixed)
    # it divides 1536, which no layer has
    assert refused(checks.check_layout, ParallelSettings(tp=3, sequence_parallel=True), mixed) == (
        "parallel.tp=3 does not divide the model's 100 feed-forward columns; set parallel.tp to 1."
    )
    divided = replace(SMOLLM2, experts=Experts(count=8, chosen=2, ffn=96, normalised=True))
    checks.check_layout(ParallelSettings(tp=3, sequence_parallel=True), divided)
    assert refused(checks.check_layout, ParallelSettings(tp=3), divided) == (
        "parallel.tp=3 and a model with experts: megatron-core trains them only with the sequence split over the "
        "ranks; set parallel.sequence_parallel=true."
    )


def test_pp_must_divide_layers():
    assert refused(checks.check_layout, ParallelSettings(pp=4), SMOLLM2) == (
        "parallel.pp=4 does not divide the model's 30 layers; set parallel.pp to 1, 2, 3, 5, 6, 10, 15 or 30."
    )


def test_cuda_without_a_gpu():
    settings = RunSettings(name="x", steps=1, device="cuda")
    checks.check_device(settings, gpus=1)
    assert refused(checks.check_device, settings, gpus=0) == (
        "run.device is cuda, but torch sees no GPU on this machine; set run.device=cpu or auto."
    )


def test_a_batch_that_cannot_be_divided():
    check = checks.check_batch
    check(RolloutSettings(problems_per_step=12), OptimizerSettings(mini_batches=2), ParallelSettings(dp=3))
    assert refused(
        check, RolloutSettings(problems_per_step=16), OptimizerSettings(mini_batches=3), ParallelSettings()
    ) == (
        "rollout.problems_per_step is 16, which does not divide into optimizer.mini_batches=3 times parallel.dp=1; "
        "set rollout.problems_per_step to a multiple of 3."
    )
    assert refused(
        check,
        RolloutSettings(problems_per_step=16),
        OptimizerSettings(mini_batches=2),
        ParallelSettings(dp=3),
    ) == (
        "rollout.problems_per_step is 16, which does not divide into optimizer.mini_batches=2 times "
        "parallel.dp=3; set rollout.problems_per_step to a multiple of 6."
    )


def test_a_group_of_one():
    one = RolloutSettings(group_size=1)
    checks.check_teaching(RolloutSettings(), RepromptSettings(), loss_of())
    checks.check_teaching(one, RepromptSettings(own_success="always"), loss_of())
    assert refused(checks.check_teaching, one, RepromptSettings(), loss_of()) == (
        "rollout.group_size is 1, so no response has a sibling to learn from; "
        "set rollout.group_size to 2 or more, or reprompt.own_success=always."
    )
    grpo = loss_of("grpo")
    assert refused(checks.check_teaching, one, RepromptSettings(own_success="always"), grpo) == (
        "rollout.group_size is 1 with loss.name=grpo, where every advantage is 0 "
        "(reward minus the group's mean); set rollout.group_size to 2 or more."
    )


def test_min_lr():
    assert refused(checks.check_optimizer, OptimizerSettings(lr=1e-5, min_lr=1e-4)) == (
        "optimizer.min_lr is 0.0001, above optimizer.lr=1e-05; set it to at most that."
    )


def test_lengths():
    def check(context: int, max_tokens: int, eval_max_tokens: int | None = None) -> None:
        checks.check_lengths(
            ModelSettings(path="p", max_context_length=context),
            RolloutSettings(max_tokens=max_tokens),
            EvalSettings(max_tokens=eval_max_tokens),
            SMOLLM2,
        )

    check(8192, 8191)
    assert refused(check, 512, 512) == (
        "rollout.max_tokens is 512, which leaves no room for a prompt in model.max_context_length=512; "
        "set rollout.max_tokens lower."
    )
    assert refused(check, 512, 16, 600).startswith(
        "eval.max_tokens is 600, which leaves no room for a prompt"
    )
    assert refused(check, 8193, 16) == (
        "model.max_context_length is 8193, but the model was made for 8192 positions; "
        "set model.max_context_length to at most 8192."
    )


def test_the_server_that_we_start():
    checks.check_server(ServerSettings(python=sys.executable))
    assert refused(checks.check_server, ServerSettings(python="no/such/python")) == (
        "server.python: there is no program no/such/python in this directory or on PATH; run: make .venv-sglang, "
        "or give the path of one that is elsewhere, or server.urls of running servers."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", "k"], "--api-key, which the trainer sets itself; remove it."),
        (["--api-key=k"], "--api-key, which the trainer sets itself; remove it."),
        (["--api", "k"], "--api, which the trainer sets itself; remove it."),
        (["--host", "0.0.0.0"], "--host, which the trainer sets itself; set server.host instead."),
        (["--random-seed=5", "--port=1"], "--port, which the trainer sets itself; remove it."),
        (
            ["--mem-fraction-static=0.5"],
            "--mem-fraction-static, which the trainer sets itself; set server.memory_fraction instead.",
        ),
        (
            ["--enable-memory-saver"],
            "--enable-memory-saver, which the trainer sets itself; set server.release_memory instead.",
        ),
        (["--model", "x"], "--model, which the trainer sets itself; set model.path instead."),
        (["--tp", "2"], "--tp, which the trainer sets itself; set server.tp instead."),
    ],
)
def test_server_arguments_that_are_the_trainers(arguments: list[str], message: str):
    """A key among them would be stored, another port never found; SGLang takes beginnings of options for them."""
    settings = ServerSettings(urls=["http://a:1"], args=arguments)
    assert refused(checks.check_server, settings) == f"server.args holds {message}"


def test_other_server_arguments():
    arguments = ["--max-total-tokens", "5000", "--random-seed=1", "--attention-backend", "triton", "-x"]
    checks.check_server(ServerSettings(urls=["http://a:1"], args=arguments))


def test_memory_can_only_be_released_on_gpus():
    settings = ServerSettings(release_memory=True)
    checks.check_released_memory(settings, on_gpus=True)
    checks.check_released_memory(ServerSettings(), on_gpus=False)
    assert refused(checks.check_released_memory, settings, on_gpus=False) == (
        "server.release_memory is true, but only on GPUs can a server release its memory, and this run is on the CPU; "
        "set server.release_memory=false."
    )


def test_server_urls():
    for url in ("http://10.0.0.1:30000", "https://[::1]:1/behind/a/proxy"):
        checks.check_server(ServerSettings(urls=[url], python="no/such/python"))
    for url in (
        "10.0.0.1:30000",
        "http://",
        "ftp://x",
        "http://a b",
        "http://a:1\n",
        "http://a?b",
        "http://a#b",
    ):
        message = refused(checks.check_server, ServerSettings(urls=[url]))
        assert message == f"server.urls holds {url!r}; write it as http://HOST:PORT."


def test_a_password_in_a_url_is_refused_and_not_shown():
    message = refused(checks.check_server, ServerSettings(urls=["http://me:secret@host:1"]))
    assert message == "server.urls holds 'http://...@host:1'; write it as http://HOST:PORT."


@pytest.mark.parametrize(
    "again", ["http://127.0.0.1:80", "http://127.0.0.1/", "http://localhost:80", "HTTP://LOCALHOST"]
)
def test_a_server_that_is_named_twice(again: str):
    checks.check_server(
        ServerSettings(urls=["http://127.0.0.1", "http://127.0.0.1:81", "http://127.0.0.1/a"])
    )
    assert refused(checks.check_server, ServerSettings(urls=["http://127.0.0.1", again])) == (
        "server.urls names the server http://127.0.0.1 more than once; give each server once."
    )


@pytest.mark.parametrize(
    "arguments", [["--config", "f.yaml"], ["--admin-api-key=k"], ["--ssl-keyfile-p", "k"], ["--adm", "k"]]
)
def test_server_arguments_that_bring_a_secret_to_where_others_see_it(arguments: list[str]):
    message = refused(checks.check_server, ServerSettings(urls=["http://a:1"], args=arguments))
    assert message == (
        f"server.args holds {arguments[0].partition('=')[0]}, but arguments are shown to all users of the machine and "
        "stored in config.json; remove it."
    )


def keyed(path: Path, **settings: Any) -> ServerSettings:
    return ServerSettings(**{"urls": ["http://a:1"], "api_key_file": str(path), **settings})


def test_the_key_of_servers_that_run_is_read_from_a_file(tmp_path: Path):
    write_private(tmp_path / "key", "s3cret\n")
    checks.check_server(keyed(tmp_path / "key"))
    assert read_api_key(keyed(tmp_path / "key")) == "s3cret"
    assert read_api_key(ServerSettings(urls=["http://a:1"])) is None


@pytest.mark.parametrize("key", ["", "sec ret", "sécret", "secret\nsecret", "s" * 5000])
def test_a_key_that_no_header_takes(tmp_path: Path, key: str):
    write_private(tmp_path / "key", key)
    assert refused(checks.check_server, keyed(tmp_path / "key")) == (
        f"server.api_key_file: {tmp_path / 'key'} is empty, longer than 4096 bytes, or holds something else than one "
        "line of visible ASCII characters, which no HTTP header takes; write the key alone into it."
    )


def test_a_key_file_that_is_none_of_ones_own(tmp_path: Path):
    path = tmp_path / "key"
    named = f"server.api_key_file: {path}"
    assert refused(checks.check_server, keyed(path)) == (
        f"{named} cannot be read: No such file or directory; correct that, or name another."
    )
    os.mkfifo(path)
    assert refused(checks.check_server, keyed(path)).startswith(f"{named} is no regular file")
    path.unlink()
    write_private(path, "s3cret")
    path.chmod(0o640)
    assert (
        refused(checks.check_server, keyed(path)) == f"{named} may be read by others; run: chmod 600 {path}"
    )
    assert refused(checks.check_server, keyed(path, urls=[])).startswith(
        "server.api_key_file holds the key of the servers in server.urls, and there are none: leave it out"
    )


def test_template_arguments_that_are_the_trainers():
    checks.check_template_arguments(RolloutSettings(chat_template_kwargs={"enable_thinking": False}))
    message = refused(
        checks.check_template_arguments, RolloutSettings(chat_template_kwargs={"tokenize": True})
    )
    assert message == "rollout.chat_template_kwargs holds tokenize, which the trainer sets itself; remove it."


def test_columns_that_a_server_on_cpus_would_fill_up():
    odd = replace(SMOLLM2, ffn=1520)
    checks.check_feed_forward(ServerSettings(tp=3), SMOLLM2, on_gpus=False)
    checks.check_feed_forward(ServerSettings(), odd, on_gpus=True)
    checks.check_feed_forward(ServerSettings(urls=["http://h:1"]), odd, on_gpus=False)
    assert refused(checks.check_feed_forward, ServerSettings(), odd, on_gpus=False) == (
        "The model's feed-forward networks have 1520 columns, which SGLang on a CPU fills up to a multiple of 32: no "
        "push could be proved. Take a model with such a multiple, or a machine with GPUs."
    )
    mixed = replace(SMOLLM2, experts=Experts(count=8, chosen=2, ffn=96, normalised=True))
    checks.check_feed_forward(ServerSettings(tp=3), mixed, on_gpus=False)
    assert "have 96 columns" in refused(checks.check_feed_forward, ServerSettings(tp=2), mixed, on_gpus=False)


def test_server_tp():
    checks.check_server_layout(ServerSettings(tp=9), SMOLLM2)
    checks.check_server_layout(ServerSettings(tp=2, urls=["http://h:1"]), SMOLLM2)
    assert refused(checks.check_server_layout, ServerSettings(tp=2), SMOLLM2) == (
        "server.tp=2 does not divide the model's 9 attention heads; set server.tp to 1, 3 or 9."
    )


def test_a_model_whose_path_a_server_takes_for_a_pattern():
    checks.check_model_path(ServerSettings(), Path("/models/tiny-2 (new)"))
    checks.check_model_path(ServerSettings(urls=["http://h:1"]), Path("/models/[2]"))
    assert refused(checks.check_model_path, ServerSettings(), Path("/models/[2]")) == (
        "SGLang cannot read a model in /models/[2]: it takes a path with [, * or ? for a pattern. Move the model, or "
        "give the path of a symbolic link to it."
    )


@pytest.mark.parametrize(
    "package, settings", [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "offline"})]
)
def test_log_packages(monkeypatch: pytest.MonkeyPatch, package: str, settings: dict):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    checks.check_log(LogSettings(), RolloutSettings())
    assert refused(checks.check_log, LogSettings(**settings), RolloutSettings()) == (
        f"log.{package} is on, but the package {package} is not installed; run: pip install {package}"
    )


def test_more_groups_to_log_than_there_are():
    rollout = RolloutSettings(problems_per_step=4)
    for groups in (None, 0, 4):
        checks.check_log(LogSettings(num_groups_to_log=groups), rollout)
    assert refused(checks.check_log, LogSettings(num_groups_to_log=5), rollout) == (
        "log.num_groups_to_log is 5, but a step has as many groups as rollout.problems_per_step=4 says; set "
        "log.num_groups_to_log=4 or less."
    )


@pytest.mark.parametrize(
    ("settings", "problems", "groups"),
    [
        ({}, 4, 4),
        ({}, 32, 16),
        ({"num_groups_to_log": 0}, 4, 0),
        ({"num_groups_to_log": 32}, 32, 32),
        ({"rollouts": False}, 4, 0),
    ],
)
def test_how_many_groups_are_recorded(settings: dict, problems: int, groups: int):
    assert LogSettings(**settings).recorded_groups(problems) == groups


def test_a_model_needs_a_tokenizer(tmp_path: Path):
    assert refused(checks.check_tokenizer_file, tmp_path) == (
        f"model.path: {tmp_path} has no tokenizer.json; download the model's tokenizer into it."
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    checks.check_tokenizer_file(tmp_path)


def test_a_loss_that_learns_from_a_teacher_needs_one():
    checks.check_teacher(loss_of("grpo"), TeacherSettings(name="off"))
    assert refused(checks.check_teacher, loss_of(), TeacherSettings(name="off")) == (
        "loss.name=divergence learns from a teacher, but teacher.name is off; set teacher.name to frozen, ema, "
        "trust_region or live, or loss.name=grpo."
    )


@pytest.mark.parametrize("name", ["ema", "live"])
def test_a_teacher_that_is_the_policy_has_no_model_of_its_own(name):
    checks.check_teacher(loss_of(), TeacherSettings(name="trust_region", path="x"))
    assert refused(checks.check_teacher, loss_of(), TeacherSettings(name=name, path="x")) == (
        f"teacher.path is set, but teacher.name={name} teaches with the policy's own weights; remove teacher.path, or "
        "set teacher.name to frozen or trust_region."
    )


def test_nothing_of_its_own_cannot_be_put_away():
    checks.check_teacher(loss_of(), TeacherSettings(name="ema", offload=True))
    assert refused(checks.check_teacher, loss_of(), TeacherSettings(name="live", offload=True)) == (
        "teacher.offload is on, but teacher.name=live has no weights of its own to put away; set "
        "teacher.offload=false."
    )


def test_top_k():
    checks.check_top_k(loss_of(top_k=49152), SMOLLM2)
    for loss in (loss_of(top_k=49153), loss_of("clipped_divergence", top_k=49153)):
        assert refused(checks.check_top_k, loss, SMOLLM2) == (
            "loss.top_k is 49153, but the vocabulary has 49152 tokens; set it lower."
        )


def test_several_optimizer_steps_want_a_clip_or_a_choice():
    two = OptimizerSettings(mini_batches=2)
    checks.check_mini_batches(loss_of(), OptimizerSettings(), chosen=False)
    checks.check_mini_batches(loss_of(), two, chosen=True)
    checks.check_mini_batches(loss_of("clipped_divergence"), two, chosen=True)
    with pytest.raises(ConfigError) as caught:
        checks.check_mini_batches(loss_of(), two, chosen=False)
    assert str(caught.value) == (
        "optimizer.mini_batches is 2, and nothing clips the default loss.name=divergence against the policy that "
        "sampled; set loss.name=clipped_divergence, or loss.name=divergence to keep it."
    )


def test_the_teachers_model(tmp_path: Path):
    config = Config(
        run=RunSettings(name="x", steps=1),
        model=ModelSettings(path="p", max_context_length=512),
        task=TaskSettings(env="equations"),
    )
    student = write_model(tmp_path / "student")
    shape = read_model_shape(student)
    assert checks.check_teacher_model(student, config, shape) == shape
    other = write_model(tmp_path / "other", vocab_size=shape.vocab + 8)
    assert refused(checks.check_teacher_model, other, config, shape) == (
        f"teacher.path has a vocabulary of {shape.vocab + 8} tokens, model.path one of {shape.vocab}: their "
        "distributions cannot be compared; give a teacher with the same tokenizer."
    )
    assert refused(checks.check_teacher_model, tmp_path / "none", config, shape) == (
        f"teacher.path: there is no directory {tmp_path / 'none'}; give a Hugging Face model directory."
    )
    small = write_model(tmp_path / "small", max_position_embeddings=256)
    assert refused(checks.check_teacher_model, small, config, shape) == (
        "model.max_context_length is 512, but the model of teacher.path was made for 256 positions; set "
        "model.max_context_length to at most that."
    )


def test_problem_counts():
    rollout = RolloutSettings(problems_per_step=16)
    checks.check_problem_counts(rollout, train=16)
    assert refused(checks.check_problem_counts, rollout, train=15) == (
        "rollout.problems_per_step is 16, but there are 15 training problems; set it to at most 15."
    )


CONFIG = Config(
    run=RunSettings(name="x", steps=1),
    model=ModelSettings(path="p"),
    task=TaskSettings(env="equations"),
    server=ServerSettings(python=sys.executable),
)


@pytest.mark.parametrize(
    "changes, start",
    [
        ({"parallel": ParallelSettings(cp=2)}, "parallel.cp"),
        ({"parallel": ParallelSettings(pp=2)}, "The number of ranks that were started is 1"),
        ({"run": RunSettings(name="x", steps=1, device="cuda")}, "run.device"),
        ({"optimizer": OptimizerSettings(mini_batches=3)}, "rollout.problems_per_step"),
        ({"rollout": RolloutSettings(group_size=1)}, "rollout.group_size"),
        ({"optimizer": OptimizerSettings(min_lr=1.0)}, "optimizer.min_lr"),
        ({"server": ServerSettings(python="no/such")}, "server.python"),
        ({"server": ServerSettings(python=sys.executable, tp=2)}, "server.tp"),
        ({"rollout": RolloutSettings(max_tokens=2048)}, "rollout.max_tokens"),
    ],
)
def test_check_settings_runs_every_check(tmp_path: Path, changes: dict, start: str):
    (tmp_path / "tokenizer.json").write_text("{}")
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    write_weights(tmp_path, read_model_shape(tmp_path))
    assert checks.check_settings(CONFIG, tmp_path, world_size=1, gpus=0, loss_is_chosen=True).heads == 9
    config = CONFIG.model_copy(update=changes)
    assert refused(
        checks.check_settings, config, tmp_path, world_size=1, gpus=0, loss_is_chosen=True
    ).startswith(start)


def test_check_settings_reads_the_model(tmp_path: Path):
    message = refused(
        checks.check_settings, CONFIG, tmp_path / "none", world_size=None, gpus=0, loss_is_chosen=True
    )
    assert message.startswith("model.path: there is no directory")


@pytest.mark.parametrize(
    ("settings", "on_loopback"),
    [
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"urls": ["http://127.0.0.1:1", "http://localhost:2", "http://[::1]:3"]}, True),
        ({"urls": ["http://127.0.0.1:1", "http://node7:2"]}, False),
    ],
)
def test_whether_all_servers_are_on_this_machine(settings: dict[str, Any], on_loopback: bool):
    """What another machine shall reach cannot listen on loopback."""
    assert are_on_loopback(ServerSettings(**settings)) == on_loopback
