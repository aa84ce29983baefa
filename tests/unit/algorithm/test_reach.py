"""How much of the teacher lies where the student never goes: whose tokens count, what is said, which loss could learn
it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sdpo_megatron.algorithm.examination import LEAST
from sdpo_megatron.algorithm.losses import LOSSES, build_terms
from sdpo_megatron.algorithm.reach import LARGEST_UNREACHED, Reach, reach_of
from sdpo_megatron.kernels.divergence import divergence_definition
from sdpo_megatron.kernels.top_k import top_k_definition
from sdpo_megatron.records import Sample
from tests.loss_settings import loss_settings

END = 9


def sample(id: int, ids: list[int], *, success: bool = False, taught: int | None = None) -> Sample:
    return Sample(
        id=id,
        prompt_ids=[1],
        response_ids_T=ids,
        rollout_logprobs_T=[-1.0] * len(ids),
        loss_mask_T=[1] * len(ids),
        teacher_prompt_ids=None if taught == 0 else [1, 2],
        teacher_tokens=len(ids) if taught is None else taught,
        success=success,
        group_advantage=0.0,
    )


def test_the_tokens_of_failed_responses_with_a_teacher_count_also_by_feedback_alone():
    samples = [
        sample(0, [5, 6, 7, 8, 5, END]),
        sample(1, [5, END], success=True),
        sample(2, [5, END], taught=0),
        sample(3, [5, 6, 7], taught=2),  # its end does not fit the teacher's context
        sample(4, [5, END]),  # not computed
    ]
    unreached = [*(0.9, 0.1, 0.0, 0.2, 0.0, 0.6), *(1.0, 1.0), *(1.0, 1.0), *(0.5, 0.1, 1.0), *(1.0, 1.0)]
    computed = [1] * 13 + [0] * 2
    seen = {"unreached": np.array(unreached), "computed": np.array(computed)}
    reach = reach_of(samples, seen, {END})
    assert reach.failed == 2
    assert reach.metrics == pytest.approx(
        {
            "teacher/unreached/all": (0.3 + 0.3) / 2,
            "teacher/unreached/first": (0.3 + 0.3) / 2,
            "teacher/unreached/end": 0.6,
        }
    )
    nothing = reach_of(samples[1:3], {name: column[6:10] for name, column in seen.items()}, {END})
    assert (nothing.failed, nothing.metrics, nothing.said(), nothing.is_short) == (0, {}, "", False)


@pytest.mark.parametrize(
    ("shares", "short"),
    [
        ({"all": 0.0015, "first": 0.0003, "end": 0.0026}, False),  # SmolLM2 in the demo of sums
        ({"all": 0.087, "first": 0.24, "end": 0.036}, True),  # with feedback that asks for brackets
        ({"all": 0.02, "first": 0.0, "end": 0.5}, True),
        ({"all": 0.11, "first": 0.0}, True),
        ({"all": LARGEST_UNREACHED, "first": LARGEST_UNREACHED}, False),
    ],
)
def test_it_is_short_where_any_part_is_beyond_the_bound(shares: dict[str, float], short: bool):
    reach = Reach(failed=LEAST, shares=shares)
    assert reach.is_short == short
    assert not replace(reach, failed=LEAST - 1).is_short


def test_what_is_said():
    reach = Reach(failed=80, shares={"all": 0.0872, "first": 0.239, "end": 0.04})
    assert reach.said() == (
        "Of its probability on 80 failed responses, 8.7% (of their first 4 tokens 23.9%) lies on tokens to which the "
        "student gives less than 0.0001."
    )


@pytest.mark.parametrize(
    ("values", "raises"),
    [
        ({"alpha": 0.0}, True),
        ({"alpha": 0.0, "top_k": 5, "top_k_support": "teacher"}, True),
        ({"alpha": 0.0, "top_k": 5}, False),
        ({"alpha": 0.5}, False),
        ({"alpha": 0.5, "top_k": 5, "top_k_support": "teacher"}, False),
        ({"alpha": 1.0}, False),
    ],
    ids=str,
)
def test_a_loss_that_says_it_raises_what_is_hardly_sampled_does(values: dict, raises: bool):
    """By the gradient of the logit of a token to which the student gives 1e-6 and the teacher 0.6."""
    (term,) = build_terms(loss_settings(**values))
    assert term.loss.raises_unsampled == raises
    student_TV, teacher_TV = torch.full((1, 20), 0.1 / 18), torch.full((1, 20), 0.1 / 18)
    student_TV[0, :2], teacher_TV[0, :2] = torch.tensor([1e-6, 0.9]), torch.tensor([0.6, 0.3])
    logits_TV = student_TV.double().log().requires_grad_()
    asked: dict[str, Any] = vars(term.loss.comparison) | {"temperature": 1.0}
    definition: Any = top_k_definition if "k" in asked else divergence_definition
    definition(logits_TV, teacher_TV.double().log(), **asked).sum().backward()
    assert logits_TV.grad is not None
    assert (float(logits_TV.grad[0, 0]) < -0.5) == raises
    assert raises or abs(float(logits_TV.grad[0, 0])) < 1e-4


def test_no_loss_at_sampled_tokens_says_so():
    names = [loss.Settings.model_fields["name"].default for loss in LOSSES]
    saying = [name for name in names if build_terms(loss_settings(name))[0].loss.raises_unsampled]
    assert saying == [] and "token" in names
