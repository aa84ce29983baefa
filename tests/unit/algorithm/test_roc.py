"""The area under the ROC curve and its interval against their definitions, and against repeated draws."""

import math
import random

import pytest

from sdpo_megatron.algorithm.roc import clustered_auc


def delong(x: list[float], y: list[float]) -> tuple[float, float]:
    """AUC and standard error by DeLong's own sums (Biometrics 44, 1988)."""

    def above(a: float, b: float) -> float:
        return 1.0 if a > b else 0.5 if a == b else 0.0

    v_x = [sum(above(a, b) for b in y) / len(y) for a in x]
    v_y = [sum(above(a, b) for a in x) / len(x) for b in y]
    auc = sum(v_x) / len(x)
    s_x = sum((v - auc) ** 2 for v in v_x) / (len(x) - 1)
    s_y = sum((v - auc) ** 2 for v in v_y) / (len(y) - 1)
    return auc, math.sqrt(s_x / len(x) + s_y / len(y))


def test_with_clusters_of_one_it_is_delongs():
    rng = random.Random(0)
    x = [round(rng.gauss(0.5, 1), 1) for _ in range(30)]
    y = [round(rng.gauss(0, 1), 1) for _ in range(50)]
    auc, error = delong(x, y)
    found = clustered_auc(list(enumerate(x)), [(100 + k, score) for k, score in enumerate(y)])
    assert found.value == pytest.approx(auc)
    assert found.low == pytest.approx(auc - 1.959964 * error)
    assert found.high == pytest.approx(min(1.0, auc + 1.959964 * error))


@pytest.mark.parametrize("order", [1.0, -1.0])
def test_perfect_order_and_its_reverse(order):
    right, wrong = [(k, order) for k in range(20)], [(k, 0.0) for k in range(20)]
    found = clustered_auc(right, wrong)
    assert (found.low, found.value, found.high) == ((1.0, 1.0, 1.0) if order > 0 else (0.0, 0.0, 0.0))


def test_one_group_of_right_responses_proves_nothing():
    found = clustered_auc([(0, 1.0)] * 20, [(k, 0.0) for k in range(20)])
    assert (found.low, found.value, found.high) == (0.0, 1.0, 1.0)


def test_the_interval_holds_chance_where_groups_move_together():
    """Each group's responses share an offset, right ones and wrong ones are otherwise alike."""
    rng = random.Random(1)
    missed = apart = 0
    for _ in range(400):
        right, wrong = [], []
        for group in range(16):
            offset, rate = rng.gauss(0, 1), rng.random()
            for _ in range(8):
                (right if rng.random() < rate else wrong).append((group, offset + rng.gauss(0, 0.3)))
        found = clustered_auc(right, wrong)
        missed += not found.low <= 0.5 <= found.high
        alone = clustered_auc(
            [(k, score) for k, (_, score) in enumerate(right)],
            [(-k - 1, score) for k, (_, score) in enumerate(wrong)],
        )
        apart += not alone.low <= 0.5 <= alone.high
    assert missed / 400 < 0.12
    # as if all responses were independent, chance is refused far more often than one time in twenty
    assert apart / 400 > 0.25
