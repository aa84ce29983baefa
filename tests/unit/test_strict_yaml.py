import re
from pathlib import Path

import pytest

from sdpo_megatron.config import Section, load_config
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.strict_yaml.load import flatten, parse

REQUIRED = """
run: {name: x, steps: 3}
model: {path: p}
task: {env: equations}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(REQUIRED)
    return file


def write(base: Path, text: str) -> Path:
    file = base.parent / "more.yaml"
    file.write_text(text)
    return file


def refused(paths: list[Path], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{paths[0].parent}/", "")


def test_overrides_win_over_later_files_over_earlier_ones_over_defaults(base: Path):
    more = write(base, "optimizer: {lr: 2e-5, eps: 1e-6}\nrun: {steps: 4}\n")
    config, origins = load_config([base, more], ["optimizer.eps=1e-7"])
    assert (config.run.steps, config.optimizer.lr, config.optimizer.eps) == (4, 2e-5, 1e-7)
    assert origins["run.name"] == str(base)
    assert origins["run.steps"] == origins["optimizer.lr"] == str(more)
    assert origins["optimizer.eps"] == "command line"
    assert origins["optimizer.beta1"] == "default"


def test_every_value_has_an_origin(base: Path):
    config, origins = load_config([base])
    for key, _ in flatten(config.model_dump()):
        assert key in origins


def test_mappings_are_merged_and_lists_replaced(base: Path):
    more = write(base, "task: {options: {digits: 2, operators: ['+']}}\n")
    config, origins = load_config([base, more], ["task.options.operators=['-', '*']"])
    assert config.task.options == {"digits": 2, "operators": ["-", "*"]}
    assert origins["task.options.digits"] == str(more)
    assert origins["task.options.operators"] == "command line"


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", ".1e-5"])
def test_a_number_is_a_number_however_it_is_written(base: Path, text: str):
    assert load_config([base, write(base, f"optimizer: {{lr: {text}}}")])[0].optimizer.lr == 1e-6
    assert load_config([base], [f"optimizer.lr={text}"])[0].optimizer.lr == 1e-6


def test_off_is_text_not_false(base: Path):
    assert load_config([base], ["log.wandb=off"])[0].log.wandb == "off"


def test_a_later_file_can_set_null(base: Path):
    assert (
        load_config([base, write(base, "server: {api_key_file: k}")], ["server.api_key_file=null"])[
            0
        ].server.api_key_file
        is None
    )


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "loss.clip_lo=1",
            "Unknown key 'loss.clip_lo'. Did you mean 'loss.clip_low'? "
            "loss (name=divergence) has: group_advantage_weight, clip_low, clip_high, is_clip, rollout_is_cap, name, "
            "alpha, top_k, top_k_rest, top_k_support.",
        ),
        (
            "checkpoint.tp=1",
            "Unknown key 'checkpoint.tp'. Did you mean 'server.tp'? checkpoint has: every, keep, export_hf.",
        ),
        ("checkpoint.zzz=1", "Unknown key 'checkpoint.zzz'. checkpoint has: every, keep, export_hf."),
        (
            "run.stepz=3",
            "Unknown key 'run.stepz'. Did you mean 'run.steps'? run has: name, dir, private, seed, steps, device, "
            "stop_grace_s, hang_timeout_s.",
        ),
        ("optimizer.lr=fast", "optimizer.lr is 'fast' (text, from the command line); it must be a number."),
        (
            "optimizer.lr=true",
            "optimizer.lr is True (true or false, from the command line); it must be a number.",
        ),
        (
            "optimizer.lr=0",
            "optimizer.lr is 0 (whole number, from the command line); it must be greater than 0.",
        ),
        ("optimizer.lr=.inf", "optimizer.lr is inf (number, from the command line); it must be finite."),
        (
            "optimizer.beta1=1",
            "optimizer.beta1 is 1 (whole number, from the command line); it must be less than 1.",
        ),
        ("run.steps=1.5", "run.steps is 1.5 (number, from the command line); it must be a whole number."),
        ("run.steps=", "run.steps is nothing; it must be a whole number."),
        (
            "run.name=5",
            "run.name is 5 (whole number, from the command line); "
            "it must be text (in quotes if it looks like something else).",
        ),
        (
            "loss.name=ppo",
            "loss.name is 'ppo' (text, from the command line); "
            "it must be 'divergence', 'clipped_divergence', 'token', 'sequence', 'grpo' or 'rlsd'.",
        ),
        (
            "log.tensorboard=yes",
            "log.tensorboard is 'yes' (text, from the command line); it must be true or false.",
        ),
        (
            "server.args=x",
            "server.args is 'x' (text, from the command line); it must be a list, for example [a, b].",
        ),
        (
            "server.args=[a, 1]",
            "server.args.1 is 1 (whole number, from the command line); "
            "it must be text (in quotes if it looks like something else).",
        ),
        (
            "task.options=3",
            "task.options is 3 (whole number, from the command line); "
            "it must be a mapping, for example {key: value}.",
        ),
        (
            "loss=3",
            "loss is 3 (whole number, from the command line); "
            "it must be a section that has: group_advantage_weight, clip_low, clip_high, is_clip, rollout_is_cap, "
            "name, alpha, top_k, top_k_rest, top_k_support.",
        ),
        ("loss", "'loss' is not an override; write section.key=value, for example optimizer.lr=1e-6."),
        (
            "server.args=[1",
            "'server.args=[1' line 1: not valid YAML: expected ',' or ']', but got '<stream end>'.",
        ),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(base: Path, override: str, message: str):
    assert refused([base], override) == message


def test_what_is_wrong_in_a_file_names_the_file(base: Path):
    more = write(base, "optimizer: {lr: fast}")
    assert refused([base, more]) == "optimizer.lr is 'fast' (text, from more.yaml); it must be a number."
    more = write(base, "optimizer: {lrr: 1}")
    assert refused([base, more]).startswith(
        "Unknown key 'optimizer.lrr' in more.yaml. Did you mean 'optimizer.lr'?"
    )


def test_missing_keys(base: Path):
    base.write_text("run: {name: x, steps: 1}\nmodel: {path: p}\n")
    assert refused([base]) == "Missing section 'task': add it to the YAML file; it has: env, options."
    base.write_text("run: {name: x}\nmodel: {path: p}\ntask: {env: e}\n")
    assert refused([base]) == "Missing key 'run.steps': set it in a YAML file or as run.steps=VALUE."


@pytest.mark.parametrize(
    "text, message",
    [
        ("run: {name: x\nmodel: 3", "more.yaml line 2: not valid YAML: expected ',' or '}', but got ':'."),
        (
            "run:\n  seed: 1\n  seed: 2\n",
            "more.yaml line 3: key 'seed' is given twice (first on line 2); keep one.",
        ),
        ("1: 2\n", "more.yaml line 1: this key is not text; put it in quotes."),
        (
            "- a\n",
            "more.yaml holds a list; it must hold sections: run, model, task, grading, rollout, server, reprompt, "
            "loss, teacher, "
            "optimizer, parallel, weight_sync, eval, checkpoint, log.",
        ),
        (
            "a: !!python/name:os.system x",
            "more.yaml line 1: the tag !!python/name:os.system means nothing here",
        ),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(base: Path, text: str, message: str):
    assert refused([base, write(base, text)]).startswith(message)


def test_files_that_cannot_be_read(base: Path):
    assert refused([base, base.parent / "no.yaml"]) == "There is no file no.yaml."
    assert re.fullmatch(r".* is a directory; give a YAML file\.", refused([base, base.parent]))
    base.write_bytes(b"run: \xff")
    assert refused([base]).startswith("base.yaml: not a text file in UTF-8:")


def test_an_empty_file_sets_nothing(base: Path):
    assert load_config([base, write(base, "# nothing\n")])[0] == load_config([base])[0]


def test_settings_of_another_owner_are_explained_under_their_prefix():
    class Options(Section):
        digits: int = 2

    assert parse(Options, {"digits": 3}, {}, "task.options").digits == 3
    with pytest.raises(ConfigError) as caught:
        parse(Options, {"digit": 3}, {}, "task.options")
    assert str(caught.value) == (
        "Unknown key 'task.options.digit'. Did you mean 'task.options.digits'? task.options has: digits."
    )
    with pytest.raises(
        ConfigError, match=r"^task.options.digits is 'x' \(text, from y.yaml\); it must be a whole"
    ):
        parse(Options, {"digits": "x"}, {"task.options.digits": "y.yaml"}, "task.options")


def test_a_section_of_several_kinds_keeps_what_the_new_kind_has(base: Path):
    """Of an earlier file's loss; what one source says of its own loss must fit it."""
    more = write(base, "loss: {alpha: 0.5, rollout_is_cap: 3.0}")
    config, origins = load_config([base, more], ["loss.name=grpo"])
    assert config.loss.model_dump() == {
        **{"name": "grpo", "rollout_is_cap": 3.0, "clip_low": 0.2, "clip_high": 0.28, "is_clip": None}
    }
    assert origins["loss.name"] == "command line" and origins["loss.rollout_is_cap"] == str(more)
    assert refused([base], "loss.alpha=0.5", "loss.name=grpo").startswith("loss.alpha means nothing")
    assert load_config([base], ["loss.alpha=0.5"])[0].loss.name == "divergence"  # type: ignore[attr-defined]
