"""The runs of a sweep."""

import pytest

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.submission.sweep import combinations


def test_the_product_with_names_of_their_own():
    found = combinations(["optimizer.lr=1e-5,1e-6", "loss.name=grpo, token"])
    assert [one.overrides for one in found] == [
        ("optimizer.lr=1e-5", "loss.name=grpo"),
        ("optimizer.lr=1e-5", "loss.name=token"),
        ("optimizer.lr=1e-6", "loss.name=grpo"),
        ("optimizer.lr=1e-6", "loss.name=token"),
    ]
    assert found[1].name("mine") == "mine-optimizer.lr_1e-5-loss.name_token"


def test_values_with_commas_and_signs_of_their_own():
    found = combinations(["task.options.operators=['+'],['+', '-']", "reprompt.template='a, b',c"])
    assert [one.overrides[0] for one in found][::2] == [
        "task.options.operators=['+']",
        "task.options.operators=['+', '-']",
    ]
    assert [one.overrides[1] for one in found][:2] == ["reprompt.template='a, b'", "reprompt.template=c"]
    assert found[2].name("x") == "x-task.options.operators_-_-reprompt.template_a_b_"


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["optimizer.lr"], "--sweep optimizer.lr: write --sweep section.key=a,b,c."),
        (["lr=1,2"], "--sweep lr=1,2: write --sweep section.key=a,b,c."),
        (["run.name=a,b"], "--sweep run.name: each run has a name of its own; leave it out."),
        (["run.dir=a,b"], "--sweep run.dir: all runs lie side by side; leave it out."),
        (
            ["hardware.nodes=1,2"],
            "--sweep hardware.nodes: the jobs of one array are alike; submit them one by one.",
        ),
        (["run.seed=1", "run.seed=2"], "--sweep run.seed: the setting is given twice; keep one."),
        (["loss.alpha=1,2"], "--sweep loss.alpha: the setting is given twice; keep one."),
        (["run.seed=1,,2"], "--sweep run.seed=1,,2: a value is empty, or is there twice; write a,b,c."),
        (["run.seed=1,1"], "--sweep run.seed=1,1: a value is empty, or is there twice; write a,b,c."),
        (
            ["optimizer.lr=1e-3,0.001"],
            "--sweep optimizer.lr=1e-3,0.001: a value is empty, or is there twice; write a,b,c.",
        ),
        (
            ["model.path=a/b,a:b"],
            "--sweep: the runs of model.path=a/b and model.path=a:b would have one name; submit one of them by itself.",
        ),
    ],
)
def test_mistakes(sweeps: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        combinations(sweeps, ["loss.alpha=0.5"])
    assert str(caught.value) == message
