"""The presets against the published rules, spelled out case by case; options beside them; what is refused."""

import pytest

from sdpo_megatron.algorithm.reprompt import PRESETS, RepromptSettings, Template, reprompt_warnings
from sdpo_megatron.algorithm.reprompt.choice import choose
from sdpo_megatron.config import Config, load_config
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.records import Grade, Group, Message, Problem, Rollout

PROBLEM = Problem(id="p", messages=[Message(role="user", content="QUESTION")])
ME, PEER, OTHER = "my answer", "a sibling's answer", "another sibling's answer"

NOTHING = (None, None)
RULES: dict[str, dict[tuple[str, bool, bool], tuple[str | None, str | None]]] = {
    # a peer's success, an attempt that succeeded as its own solution; feedback where there is no solution
    "paper": {
        ("nobody", False, True): (None, "FEEDBACK"),
        ("nobody", False, False): NOTHING,
        ("one", True, True): (ME, None),
        ("one", True, False): (ME, None),
        ("one", False, True): (PEER, None),
        ("one", False, False): (PEER, None),
        ("several", True, True): (ME, None),
        ("several", True, False): (ME, None),
        ("several", False, True): (PEER, None),
        ("several", False, False): (PEER, None),
    },
    # the first success of another response; a lone success learns nothing; feedback where there is no solution
    "official": {
        ("nobody", False, True): (None, "FEEDBACK"),
        ("nobody", False, False): NOTHING,
        ("one", True, True): NOTHING,
        ("one", True, False): NOTHING,
        ("one", False, True): (PEER, None),
        ("one", False, False): (PEER, None),
        ("several", True, True): (PEER, None),
        ("several", True, False): (PEER, None),
        ("several", False, True): (PEER, None),
        ("several", False, False): (PEER, None),
    },
    # another's success, a lone one falls back to itself; both feedback and solution where there are both
    "recipe": {
        ("nobody", False, True): (None, "FEEDBACK"),
        ("nobody", False, False): NOTHING,
        ("one", True, True): (ME, None),
        ("one", True, False): (ME, None),
        ("one", False, True): (PEER, "FEEDBACK"),
        ("one", False, False): (PEER, None),
        ("several", True, True): (PEER, None),
        ("several", True, False): (PEER, None),
        ("several", False, True): (PEER, "FEEDBACK"),
        ("several", False, False): (PEER, None),
    },
}
"""(how many of the group succeed, whether this response does, whether the environment says something) -> (solution,
feedback). The environment's words to a success are no feedback on a failed attempt."""
ROLES = {
    "paper": ["user"],
    "official": ["user"],
    "recipe": ["user", "assistant", "user"],
}


def group_of(successes: str, own: bool, feedback: bool) -> Group:
    """The second of four is the one that is asked about."""
    right = {"nobody": [], "one": [1] if own else [2], "several": [1, 2, 3] if own else [2, 3]}[successes]
    texts = ["wrong", ME, PEER, OTHER]
    return Group(
        problem=PROBLEM,
        rollouts_G=[
            Rollout(
                prompt_ids=[1],
                response_ids_T=[2],
                rollout_logprobs_T=[-1.0],
                loss_mask_T=[1],
                weight_spans=[],
                finish_reason="stop",
                text=text,
                thought="hm",
            )
            for text in texts
        ],
        grades_G=[Grade(reward=float(g in right), feedback="FEEDBACK" if feedback else "") for g in range(4)],
    )


@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("case", RULES["paper"], ids=str)
def test_a_preset_is_its_table_case_by_case(preset: str, case: tuple[str, bool, bool]):
    assert list(RULES[preset]) == list(RULES["paper"])
    settings = RepromptSettings(preset=preset)  # type: ignore[arg-type]
    choice = choose(group_of(*case), settings)[1]
    expected = RULES[preset][case]
    if choice is None:
        assert expected == NOTHING
        return
    assert (choice.hints.solution, choice.hints.feedback) == expected
    assert choice.hints.attempt is None
    messages = settings.template.show(PROBLEM, choice.hints)
    assert [message["role"] for message in messages] == ROLES[preset]
    told = messages[0 if len(messages) == 1 else 1]["content"]
    for hint in filter(None, expected):
        assert hint in told
    assert ("QUESTION" in told) == (len(messages) == 1)
    assert messages[-1]["content"].endswith("Now solve the original question correctly.")


def test_what_else_the_presets_say():
    lengths = {name: RepromptSettings(preset=name).max_prompt_length for name in PRESETS}  # type: ignore[arg-type]
    assert lengths == {"default": None, "paper": 10240, "official": 10240, "recipe": None}
    for name in PRESETS:
        settings = RepromptSettings(preset=name)  # type: ignore[arg-type]
        assert (settings.solution, settings.show_attempt, settings.success_reward_threshold) == (
            *("first", False),
            0.5,
        )


def test_a_preset_is_only_a_set_of_the_options_beside_it():
    for name, preset in PRESETS.items():
        assert set(preset) <= set(RepromptSettings.model_fields) - {"preset"}
        own = RepromptSettings(**preset)
        assert own.model_dump(exclude={"preset"}) == RepromptSettings(preset=name).model_dump(  # type: ignore[arg-type]
            exclude={"preset"}
        )
    default = RepromptSettings()
    assert RepromptSettings(preset="default") == default
    assert (default.own_success, default.feedback) == ("never", "only_without_solution")
    assert default.template == Template()


def load(tmp_path, *overrides: str) -> tuple[Config, dict[str, str]]:
    file = tmp_path / "x.yaml"
    file.write_text("run: {name: x, steps: 1}\nmodel: {path: x}\ntask: {env: equations}\n")
    return load_config([file], overrides)


def test_options_that_are_set_take_the_place_of_the_presets(tmp_path):
    config, origins = load(
        tmp_path,
        "reprompt.preset=recipe",
        "reprompt.own_success=never",
        "reprompt.template.closing=Go.",
    )
    assert config.reprompt.own_success == "never"
    assert config.reprompt.feedback == "always"
    assert config.reprompt.template.closing == "Go."
    assert config.reprompt.template.layout == "assistant_turn"
    assert config.reprompt.template.closing_without_solution == "Now solve the original question correctly."
    assert {key: origins[f"reprompt.{key}"] for key in ("own_success", "feedback", "solution")} == {
        "own_success": "command line",
        "feedback": "reprompt.preset",
        "solution": "default",
    }
    assert origins["reprompt.template.layout"] == "reprompt.preset"
    unset, _ = load(tmp_path, "reprompt.preset=paper", "reprompt.max_prompt_length=null")
    assert unset.reprompt.max_prompt_length is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "reprompt.preset=papers",
            "reprompt.preset is 'papers' (text, from the command line); it must be 'default', 'paper', 'official' or "
            "'recipe'.",
        ),
        (
            "reprompt.solution=longest",
            "reprompt.solution is 'longest' (text, from the command line); it must be 'first', 'random' or 'shortest'.",
        ),
        (
            "reprompt.feedback=true",
            "reprompt.feedback is True (true or false, from the command line); it must be 'always', "
            "'only_without_solution' or 'never'.",
        ),
        (
            "reprompt.max_prompt_length=0",
            "reprompt.max_prompt_length is 0 (whole number, from the command line); it must be greater than 0.",
        ),
        (
            "reprompt.include_environment_feedback=true",
            "reprompt.include_environment_feedback is no longer a setting: write reprompt.feedback=never for false, "
            "else leave it out.",
        ),
        (
            "reprompt.environment_feedback_only_without_solution=true",
            "reprompt.environment_feedback_only_without_solution is no longer a setting: write "
            "reprompt.feedback=always for false, only_without_solution for true.",
        ),
        (
            "reprompt=paper",
            "reprompt is 'paper' (text, from the command line); it must be a section that has: preset, "
            "success_reward_threshold, own_success, solution, feedback, show_attempt, max_prompt_length, template.",
        ),
    ],
)
def test_what_cannot_be_set(tmp_path, override: str, line: str):
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, override)
    assert refused.value.message == line


def test_an_attempt_without_feedback_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"reprompt\.show_attempt shows an attempt beside its feedback"):
        load(tmp_path, "reprompt.show_attempt=true", "reprompt.feedback=never")


def test_the_shortest_solution_is_warned_of():
    (line,) = reprompt_warnings(RepromptSettings(solution="shortest"))
    assert line.startswith("reprompt.solution=shortest is known to collapse training")
    assert (
        reprompt_warnings(RepromptSettings()) == reprompt_warnings(RepromptSettings(solution="random")) == []
    )
