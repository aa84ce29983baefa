"""From hidden states to a batch's loss, against float64 over whole rows, token by token: which row is whose, which
token has a teacher, what is written down. The losses themselves are `algorithm/test_losses.py`'s."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses import Tokens, token_losses
from sdpo_megatron.config import LossSettings
from sdpo_megatron.kernels.divergence import divergence_definition
from sdpo_megatron.kernels.top_k import top_k_definition
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.batch import Batch
from sdpo_megatron.trainer.last_stage import LastStage
from sdpo_megatron.trainer.score import Head, Packer
from sdpo_megatron.trainer.teacher import Teaching

VOCAB, PADDED, WIDTH, TEMPERATURE = 23, 24, 8, 0.7
PARALLEL: Any = SimpleNamespace(dp=1, dp_rank=0, tp_rank=0, groups=SimpleNamespace(tp=None))
HEAD_VD = torch.randn(PADDED, WIDTH, generator=torch.Generator().manual_seed(0))


def sample(
    k: int, response: list[int], taught: int | None, advantage: float, mask: list[int] | None = None
) -> Sample:
    return Sample(
        id=k,
        prompt_ids=[1, 2, k // 2],
        response_ids_T=response,
        rollout_logprobs_T=[-1.0 - 0.1 * t for t in range(len(response))],
        loss_mask_T=mask or [1] * len(response),
        teacher_prompt_ids=None if taught is None else [3, 1, k // 2],
        teacher_tokens=taught or 0,
        success=advantage > 0,
        group_advantage=advantage,
    )


SAMPLES = [
    sample(0, [4, 5, 6], 3, 0.5),
    sample(1, [4, 7, 8, 9], 2, -0.5),  # the teacher's context ends
    sample(2, [10, 11], None, 0.25),  # nothing to teach
    sample(3, [4, 5, 6, 12], 4, -0.25, [1, 1, 0, 1]),
    sample(4, [4, 5, 6], 3, 0.0),
    sample(5, [4, 5, 6], 3, 0.0),  # the same as its sibling, under the same teacher
]


def state(context: list[int]) -> Tensor:
    """Of a model that has read these tokens."""
    seed = random.Random(str(context)).randrange(2**31)
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def learn(settings: LossSettings, micro_batch_tokens: int) -> tuple[float, Tensor, Batch]:
    """(loss, its gradient by the head, the batch)."""
    packer = Packer(PARALLEL, micro_batch_tokens=micro_batch_tokens, share_prefixes=True)
    batch = Batch(SAMPLES, packer, loss=settings, group_size=2, mini_batches=1)
    rows = [
        (int(batch.ragged.starts[s.id]) + t, state([*(s.teacher_prompt_ids or []), *s.response_ids_T[:t]]))
        for s in reversed(SAMPLES)
        for t in range(s.teacher_tokens)
    ]
    row_T = torch.full((int(batch.ragged.starts[-1]),), -1)
    row_T[[place for place, _ in rows]] = torch.arange(len(rows))
    teaching = Teaching(row_T, [(1.0, torch.stack([vector for _, vector in rows]), HEAD_VD)])
    (mini_batch,) = batch.mini_batches
    shape: Any = SimpleNamespace(vocab=VOCAB)
    head = Head(shape, PARALLEL, temperature=TEMPERATURE, chunk_tokens=3)
    stage = LastStage(head, settings, batch, None if settings.name == "grpo" else teaching, mini_batch.weight)
    head_VD, loss = HEAD_VD.clone().requires_grad_(), 0.0
    for microbatch in mini_batch.microbatches:
        hidden_UD = torch.zeros(len(microbatch.rows_U), WIDTH)
        for row, k, t in zip(
            microbatch.row_T, microbatch.sample_T.tolist(), microbatch.t_T.tolist(), strict=True
        ):
            hidden_UD[row] = state([*SAMPLES[k].prompt_ids, *SAMPLES[k].response_ids_T[:t]])
        share, _ = stage(microbatch, hidden_UD.requires_grad_(), head_VD)
        share.backward()
        loss += float(share.detach())
    assert head_VD.grad is not None
    return loss, head_VD.grad, batch


def expected(settings: LossSettings) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, its gradient by the head, what is to be written down), in float64."""
    head_VD = HEAD_VD.double().requires_grad_()
    total, weight, seen = torch.zeros((), dtype=torch.float64), 0.0, []
    for s in SAMPLES:
        n = len(s.response_ids_T)
        target = torch.tensor(s.response_ids_T)[:, None]
        taught_T = (torch.arange(n) < (s.teacher_tokens if settings.name == "sdpo" else 0)).double()
        student_TV = logits([*s.prompt_ids], s, head_VD)
        teacher_TV = logits([*(s.teacher_prompt_ids or [])], s, head_VD).detach()
        student_logs_TV, teacher_logs_TV = [
            (x / TEMPERATURE).log_softmax(-1) for x in (student_TV, teacher_TV)
        ]
        student_T = student_logs_TV.gather(1, target)[:, 0]
        teacher_T = teacher_logs_TV.gather(1, target)[:, 0] * taught_T
        mask_T = torch.tensor(s.loss_mask_T).double()
        alone = settings.name == "sdpo" and settings.group_advantage_weight == 0
        weights_T = mask_T * taught_T if alone else mask_T
        counted_T = weights_T * taught_T
        mean = ((teacher_T - student_T) * counted_T).sum().detach() / counted_T.sum().clamp(min=1)
        known = Tokens(
            weights_T=weights_T,
            taught_T=taught_T,
            rollout_T=torch.tensor(s.rollout_logprobs_T).double(),
            old_T=None,
            group_advantage_T=torch.full((n,), s.group_advantage).double(),
            sequence_advantage_T=mean.expand(n),
        )
        divergence_T, mass_T = divergence_of(student_TV, teacher_TV, settings)
        loss_T, details = token_losses(student_T, teacher_T, divergence_T, known, settings)
        total, weight = total + loss_T.sum(), weight + float(weights_T.sum())
        entropy_T = -(student_logs_TV.exp() * student_logs_TV).sum(-1)
        seen.append(
            dict(student=student_T, teacher=teacher_T, divergence=divergence_T * taught_T, entropy=entropy_T,
                 loss=loss_T, mass=mass_T, **details)
        )  # fmt: skip
    loss = total / weight
    loss.backward()
    assert head_VD.grad is not None
    return (
        loss.detach(),
        head_VD.grad,
        {name: torch.cat([s[name] for s in seen]).detach() for name in seen[0]},
    )


def logits(prompt: list[int], s: Sample, head_VD: Tensor) -> Tensor:
    states = [state([*prompt, *s.response_ids_T[:t]]) for t in range(len(s.response_ids_T))]
    return (torch.stack(states).double() @ head_VD.T)[:, :VOCAB]


def divergence_of(student_TV: Tensor, teacher_TV: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """And the student's mass on what the divergence looks at."""
    if settings.name == "grpo" or settings.objective != "divergence":
        return torch.zeros(len(student_TV), dtype=torch.float64), torch.ones(len(student_TV))
    if settings.top_k is None:
        whole_T = divergence_definition(student_TV, teacher_TV, alpha=settings.alpha, temperature=TEMPERATURE)
        return whole_T, torch.ones(len(student_TV))
    largest = student_TV if settings.top_k_support == "student" else teacher_TV
    support_TK = largest.topk(settings.top_k, dim=-1).indices
    mass_T = (student_TV / TEMPERATURE).softmax(-1).gather(1, support_TK).sum(-1)
    some_T = top_k_definition(
        student_TV, teacher_TV, alpha=settings.alpha, k=settings.top_k, rest=settings.top_k_rest,
        support=settings.top_k_support, temperature=TEMPERATURE,
    )  # fmt: skip
    return some_T, mass_T


LOSSES: dict[str, dict[str, Any]] = {
    "reverse KL": {"alpha": 1.0},
    "JSD": {"alpha": 0.3},
    "forward KL, top 4": {"alpha": 0.0, "top_k": 4},
    "teacher's top 4": {"top_k": 4, "top_k_rest": "renormalise", "top_k_support": "teacher"},
    "token": {"objective": "token", "advantage_clip": 0.5},
    "sequence": {"objective": "sequence"},
    "GRPO": {"name": "grpo"},
}


@pytest.mark.parametrize("micro_batch_tokens", [5, 1000])
@pytest.mark.parametrize("blend", [0.0, 0.4])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_what_is_written_down(name: str, blend: float, micro_batch_tokens: int):
    settings = LossSettings(**LOSSES[name], group_advantage_weight=blend)
    loss, gradient_VD, batch = learn(settings, micro_batch_tokens)
    wanted, wanted_VD, wanted_seen = expected(settings)
    assert loss == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
    assert (gradient_VD - wanted_VD).abs().max() < 1e-5 * wanted_VD.abs().max()
    computed_T = batch.seen["computed"] > 0
    assert computed_T.any() and (batch.weights_T[computed_T] > 0).all()
    for what, wanted_T in wanted_seen.items():
        of_T = computed_T & (batch.taught_T > 0) if what == "mass" else computed_T
        seen_T = batch.seen[what][of_T].double()
        assert torch.allclose(seen_T, wanted_T[of_T].double(), rtol=1e-5, atol=1e-5), what


def test_a_micro_batch_of_which_nothing_is_taught_needs_no_teacher():
    """The blend learns from its rewards alone."""
    settings = LossSettings(group_advantage_weight=0.4)
    _, _, batch = learn(settings, 5)
    of_sample_2 = slice(int(batch.ragged.starts[2]), int(batch.ragged.starts[3]))
    assert batch.seen["computed"][of_sample_2].all()
    assert not batch.seen["teacher"][of_sample_2].any() and not batch.seen["divergence"][of_sample_2].any()


@pytest.mark.parametrize(
    ("settings", "learned"),
    [
        (LossSettings(), [0, 1, 3]),  # what is taught
        (LossSettings(group_advantage_weight=0.4), [0, 1, 2, 3]),
        (LossSettings(name="grpo"), [0, 1, 2, 3]),  # what was better or worse than its group
    ],
    ids=["sdpo", "blend", "grpo"],
)
def test_only_what_has_a_gradient_is_computed_but_all_is_counted(settings: LossSettings, learned: list[int]):
    samples = [*SAMPLES[:4], sample(4, [4, 5, 6], None, 0.0), sample(5, [4, 5], 2, 0.5, [0, 0])]
    packer = Packer(PARALLEL, micro_batch_tokens=1000, share_prefixes=True)
    (mini_batch,) = Batch(samples, packer, loss=settings, group_size=2, mini_batches=1).mini_batches
    assert [s.id for s in mini_batch.samples] == [s.id for s in mini_batch.own_samples] == learned
    assert mini_batch.weight == (8 if settings == LossSettings() else 15)
