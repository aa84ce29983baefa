"""How well scores tell two classes apart: the area under the ROC curve, with its interval."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959964
"""Standard deviations of a normal distribution within which 95 % lie."""


@dataclass(frozen=True)
class Auc:
    """The probability that a score of the first class is above one of the second, ties counted half."""

    value: float
    low: float
    high: float
    """The ends of the 95 % interval; 0 and 1 where fewer than two clusters hold one of the classes."""


def clustered_auc(right: Sequence[tuple[Hashable, float]], wrong: Sequence[tuple[Hashable, float]]) -> Auc:
    """Returns the AUC of scores, each given with its cluster; neither class may be empty.

    Members of a cluster (responses to one problem, under nearly one prompt) are not independent, which makes DeLong's
    interval (Biometrics 44, 1988) too narrow. The variance is that of Obuchowski (Biometrics 53, 1997), whose sums run
    over clusters; where each cluster has one member it is DeLong's.
    """
    x_M, y_N = np.array([score for _, score in right]), np.array([score for _, score in wrong])
    above_M, below_N = _share_below(y_N, x_M), 1.0 - _share_below(x_M, y_N)
    auc = float(above_M.mean())
    clusters = {name: k for k, name in enumerate(dict.fromkeys(name for name, _ in [*right, *wrong]))}
    # each cluster's sum of deviations from the mean
    deviation_right, deviation_wrong = np.zeros(len(clusters)), np.zeros(len(clusters))
    right_at = [clusters[name] for name, _ in right]
    wrong_at = [clusters[name] for name, _ in wrong]
    np.add.at(deviation_right, right_at, above_M - auc)
    np.add.at(deviation_wrong, wrong_at, below_N - auc)
    with_right, with_wrong, either = len(set(right_at)), len(set(wrong_at)), len(clusters)
    if min(with_right, with_wrong) < 2:
        return Auc(auc, 0.0, 1.0)
    m, n = len(right), len(wrong)
    variance = (
        with_right / (with_right - 1) * float((deviation_right**2).sum()) / m**2
        + with_wrong / (with_wrong - 1) * float((deviation_wrong**2).sum()) / n**2
        + 2 * either / (either - 1) * float((deviation_right * deviation_wrong).sum()) / (m * n)
    )
    half = _Z * math.sqrt(max(variance, 0.0))
    return Auc(auc, max(0.0, auc - half), min(1.0, auc + half))


def _share_below(others: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns for each value the share of the others that lie below it, ties counted half."""
    ordered = np.sort(others)
    below, not_above = ordered.searchsorted(values, "left"), ordered.searchsorted(values, "right")
    return (below + not_above) / (2 * len(others))
