"""Each warning is given when its collapse begins, and none in a healthy run."""

from collections.abc import Iterable

import pytest

from sdpo_megatron.algorithm.guards import Guards

HEALTHY = {
    "optim/grad_norm": 5.0,
    "policy/entropy": 0.3,
    "env/all/response_length/mean": 100.0,
    "env/all/format_fraction": 0.9,
    "perf/trained_tokens": 900.0,
}
KEYS = {
    "vanishing_gradient": "optim/grad_norm",
    "entropy_collapse": "policy/entropy",
    "length_collapse": "env/all/response_length/mean",
    "format_collapse": "env/all/format_fraction",
}


def warnings(rows: Iterable[dict[str, float]], guards: Guards | None = None) -> list[tuple[int, str]]:
    """(row, name) of every warning."""
    guards = guards or Guards()
    return [(k, name) for k, row in enumerate(rows) for name in guards.check(row)]


def test_a_healthy_run_is_left_alone():
    noisy = [HEALTHY | {"optim/grad_norm": 2.0 + k % 5, "policy/entropy": 0.3 * 0.95**k} for k in range(30)]
    noisy[7] = HEALTHY | {"perf/trained_tokens": 0.0, "optim/grad_norm": 0.0}  # one step without signal
    noisy[12]["env/all/response_length/mean"] = 5.0  # one odd step
    assert warnings(noisy) == []


@pytest.mark.parametrize("name", KEYS)
def test_what_shrinks_is_named_once_and_again_after_it_had_ended(name: str):
    low = HEALTHY | {KEYS[name]: HEALTHY[KEYS[name]] * 1e-3}
    rows = [HEALTHY] * 5 + [low] * 6 + [HEALTHY] * 4 + [low] * 4
    found = warnings(rows)
    assert [which for _, which in found] == [name, name]
    assert found[0][0] <= 7 and found[1][0] >= 15


def test_steps_without_signal():
    idle = HEALTHY | {"perf/trained_tokens": 0.0}
    assert warnings([HEALTHY] * 2 + [idle] * 4 + [HEALTHY] * 3 + [idle] * 5) == [(13, "no_signal")]


def test_steps_without_signal_are_no_measure_of_a_collapse():
    idle = HEALTHY | {"perf/trained_tokens": 0.0, "optim/grad_norm": 0.0}
    assert warnings([HEALTHY] * 5 + [idle, HEALTHY] + [idle] * 4) == []
    assert warnings([idle] * 3 + [HEALTHY, HEALTHY, HEALTHY | {"optim/grad_norm": 0.001}] * 3) == []


def test_the_line_says_what_is_and_what_to_change():
    guards = Guards()
    lines = {}
    for row in [HEALTHY] * 5 + [HEALTHY | {"policy/entropy": 0.001}] * 3:
        lines |= guards.check(row)
    assert lines == {
        "entropy_collapse": "entropy_collapse: policy/entropy was 0.3 in the first 3 steps and is 0.001 in the last. "
        "Little is left to explore: lower optimizer.lr, raise rollout.temperature, or take loss.alpha=0.5."
    }
    assert guards.standing == {"entropy_collapse"}


def test_a_resumed_run_knows_what_was_before():
    low = HEALTHY | {"policy/entropy": 0.001}
    rows = [HEALTHY] * 5 + [low] * 4
    assert warnings(rows[7:], Guards(rows[:7])) == warnings(rows)[:0] + [
        (k - 7, name) for k, name in warnings(rows) if k >= 7
    ]
    assert warnings([low], Guards(rows)) == []


@pytest.mark.parametrize(
    ("key", "name"),
    [("test/env/all/correct", "held_out_accuracy"), ("test/exact_answer_prob", "held_out_probability")],
)
def test_what_falls_over_two_evaluations_is_named_once(key: str, name: str):
    """The figures of a sound model that its teacher ruined; evaluations are two steps apart."""
    rows = [HEALTHY | ({key: value} if value else {}) for value in (0.81, 0, 0.78, 0, 0.50, 0, 0.30, 0, 0.19)]
    assert warnings(rows) == [(4, name)]
    assert warnings([*rows, HEALTHY | {key: 0.2}, *rows]) == [(4, name), (14, name)]


@pytest.mark.parametrize(
    "values", [(0.8, 0.5, 0.6), (0.80, 0.75, 0.70), (0.2, 0.5, 0.3, 0.4, 0.3), (0.8, 0.1)]
)
def test_noise_at_evaluations_is_not_named(values):
    assert warnings([HEALTHY | {"test/exact_answer_prob": value} for value in values]) == []


def test_a_teacher_that_prefers_wrong_responses_for_three_steps():
    def row(right: float, wrong: float) -> dict[str, float]:
        return HEALTHY | {"sdpo/advantage_right": right, "sdpo/advantage_wrong": wrong}

    good, bad = row(-0.1, -0.3), row(-0.5, -0.2)
    assert warnings([bad, bad, good] * 4) == []
    assert warnings([bad, bad, HEALTHY, bad, bad, HEALTHY, good, bad, bad, bad]) == [
        (3, "advantage_order"),
        (9, "advantage_order"),
    ]
    guards = Guards()
    lines = [line for k in range(3) for line in guards.check(row(-0.5, -0.2 + k / 100)).values()]
    assert lines[0].startswith(
        "advantage_order: sdpo/advantage_right was below sdpo/advantage_wrong in the last 3 steps, now -0.500 and "
        "-0.180 nats. The teacher prefers wrong responses to right ones: change what it reads "
    )


def test_a_server_that_computes_otherwise_is_named_by_what_rounding_explains():
    guards = Guards(largest_gap=0.1)
    depths = {"rollout_gap/depth_0": 0.02, "rollout_gap/depth_128": 0.4}
    assert guards.check({"rollout_gap/mean": 0.1}) == {}
    found = guards.check({"rollout_gap/mean": 0.2, **depths})
    assert (
        "0.2 nats on what was sampled (0.02 from token 0, 0.4 from token 128), where rounding explains 0.1"
        in (found["server_apart"])
    )
    assert guards.check({"rollout_gap/mean": 0.2, **depths}) == {}
    assert Guards().check({"rollout_gap/mean": 5.0}) == {}


def test_responses_that_end_inside_their_thoughts_are_named():
    guards, key = Guards(), "env/all/unfinished_thought_fraction"
    assert guards.check({key: 0.5}) == {}
    assert (
        "96% of the responses ended inside their thought" in guards.check({key: 0.958})["unfinished_thoughts"]
    )
