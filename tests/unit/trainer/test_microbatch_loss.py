"""From hidden states to a batch's loss, against float64 over whole rows, token by token: which row is whose, which
token has a teacher, what is written down. The losses themselves are `algorithm/test_losses.py`'s."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.losses.base import (
    LikeliestTokens,
    Loss,
    LossInputs,
    LossSettings,
    SampledTokens,
    Scores,
    Term,
    WholeVocabulary,
)
from sdpo_megatron.kernels.divergence import divergence_definition
from sdpo_megatron.kernels.top_k import top_k_definition
from sdpo_megatron.kernels.unreached import unreached_definition
from sdpo_megatron.records import Sample
from sdpo_megatron.trainer import microbatch_loss
from sdpo_megatron.trainer.batch import Batch
from sdpo_megatron.trainer.kept_states import KeptStates
from sdpo_megatron.trainer.microbatch_loss import loss_at_head
from sdpo_megatron.trainer.plan import plan
from sdpo_megatron.trainer.score import Head, Packer
from tests.loss_settings import loss_settings

VOCAB, PADDED, WIDTH, TEMPERATURE, STEP = 23, 24, 8, 0.7, 10
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

LENGTHS = [len(s.response_ids_T) for s in SAMPLES]


def state(context: list[int]) -> Tensor:
    """Of a model that has read these tokens."""
    seed = random.Random(str(context)).randrange(2**31)
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def own_batch(samples: list[Sample], packer: Packer, terms: list[Term]) -> Batch:
    losses = [term.loss for term in terms]
    (part,) = plan(samples, losses, packer.by_rank, dp=1, group_size=2, mini_batches=1)
    return Batch(part, packer, losses)


def start_of(batch: Batch, sample_id: int) -> int:
    return int(batch.ragged.starts[[s.id for s in batch.samples].index(sample_id)])


def learn(
    settings: LossSettings, micro_batch_tokens: int, *, examined: bool = False
) -> tuple[float, Tensor, Batch]:
    """(loss, its gradient by the head, the batch)."""
    packer, terms = (
        Packer(PARALLEL, micro_batch_tokens=micro_batch_tokens, share_prefixes=True),
        build_terms(settings),
    )
    batch = own_batch(SAMPLES, packer, terms)
    batch.examined = examined
    rows = [
        (start_of(batch, s.id) + t, state([*(s.teacher_prompt_ids or []), *s.response_ids_T[:t]]))
        for s in reversed(batch.samples)
        for t in range(s.teacher_tokens)
    ]
    row_B = torch.full((int(batch.ragged.starts[-1]),), -1)
    row_B[[place for place, _ in rows]] = torch.arange(len(rows))
    teaching = None
    if terms[0].loss.teacher_views:
        teaching = KeptStates(row_B, [(1.0, torch.stack([vector for _, vector in rows]), HEAD_VD)])
    (mini_batch,) = batch.mini_batches
    shape: Any = SimpleNamespace(vocab=VOCAB)
    head = Head(shape, PARALLEL, temperature=TEMPERATURE, chunk_tokens=3)
    at_loss = loss_at_head(head, terms, batch, mini_batch, teaching, STEP)
    head_VD, loss = HEAD_VD.clone().requires_grad_(), 0.0
    for microbatch in mini_batch.microbatches:
        hidden_HD = torch.zeros(len(microbatch.place_H), WIDTH)
        for row, k, t in zip(
            microbatch.hidden_row_M, microbatch.sample_M.tolist(), microbatch.index_M.tolist(), strict=True
        ):
            hidden_HD[row] = state([*SAMPLES[k].prompt_ids, *SAMPLES[k].response_ids_T[:t]])
        share, _ = at_loss(microbatch, hidden_HD.requires_grad_(), head_VD)
        share.backward()
        loss += float(share.detach())
    assert head_VD.grad is not None
    return loss, head_VD.grad, batch


def expected(settings: LossSettings) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, its gradient by the head, what is to be written down), in float64."""
    head_VD = HEAD_VD.double().requires_grad_()
    terms = build_terms(settings)
    has_teacher = terms[0].loss.teacher_views > 0
    totals, weights, seen = [torch.zeros((), dtype=torch.float64)] * len(terms), [0.0] * len(terms), []
    for s in SAMPLES:
        n = len(s.response_ids_T)
        target = torch.tensor(s.response_ids_T)[:, None]
        taught_T = (torch.arange(n) < s.teacher_tokens).double()
        student_TV = logits([*s.prompt_ids], s, head_VD)
        teacher_TV = logits([*(s.teacher_prompt_ids or [])], s, head_VD).detach()
        student_logs_TV, teacher_logs_TV = [
            (x / TEMPERATURE).log_softmax(-1) for x in (student_TV, teacher_TV)
        ]
        student_T = student_logs_TV.gather(1, target)[:, 0]
        teacher_T = teacher_logs_TV.gather(1, target)[:, 0] * taught_T * has_teacher
        mask_T = torch.tensor(s.loss_mask_T).double()
        counted_T = mask_T * taught_T
        mean = ((teacher_T - student_T) * counted_T).sum().detach() / counted_T.sum().clamp(min=1)
        divergence_T, mass_T = divergence_of(student_TV, teacher_TV, terms[0].loss)
        scores = Scores(
            student_logprobs_T=student_T, teacher_logprobs_T=teacher_T, divergences_T=divergence_T
        )
        row: dict[str, Any] = {}
        for k, term in enumerate(terms):
            weights_T = counted_T if k == 0 and settings.name not in ("grpo", "rlsd") else mask_T  # type: ignore[attr-defined]
            inputs = LossInputs(
                weights_T=weights_T,
                teacher_mask_T=taught_T,
                rollout_logprobs_T=torch.tensor(s.rollout_logprobs_T).double(),
                old_logprobs_T=None,
                group_advantages_T=torch.full((n,), s.group_advantage).double(),
                sequence_advantages_T=mean.expand(n),
                step=STEP,
            )
            loss_T, details = term.loss.token_losses(scores, inputs)
            totals[k] = totals[k] + loss_T.sum()
            weights[k] += float(weights_T.sum())
            row[f"loss {k}"] = loss_T
            row |= details if k == 0 else {x: details[x] for x in ("ratio", "correction")}
            row["clipped"] = torch.maximum(details["clipped"], row["clipped"])
        entropy_T = -(student_logs_TV.exp() * student_logs_TV).sum(-1)
        row |= dict(
            student=student_T, teacher=teacher_T, divergence=divergence_T * taught_T, entropy=entropy_T
        )
        seen.append({**row, "mass": mass_T})
    shares = [term.share / weight for term, weight in zip(terms, weights, strict=True)]
    loss = sum((share * total for share, total in zip(shares, totals, strict=True)), torch.zeros(()))
    loss.backward()
    assert head_VD.grad is not None
    joined = {name: torch.cat([s[name] for s in seen]).detach() for name in seen[0]}
    parts = [share * max(weights) * joined.pop(f"loss {k}") for k, share in enumerate(shares)]
    joined["loss"] = torch.stack(parts).sum(0)
    return loss.detach(), head_VD.grad, joined


def logits(prompt: list[int], s: Sample, head_VD: Tensor) -> Tensor:
    states = [state([*prompt, *s.response_ids_T[:t]]) for t in range(len(s.response_ids_T))]
    return (torch.stack(states).double() @ head_VD.T)[:, :VOCAB]


def divergence_of(student_TV: Tensor, teacher_TV: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """And the student's mass on what the divergence looks at."""
    asked, all_T = loss.comparison, torch.ones(len(student_TV))
    if isinstance(asked, SampledTokens):
        return torch.zeros(len(student_TV), dtype=torch.float64), all_T
    if isinstance(asked, WholeVocabulary):
        whole_T = divergence_definition(student_TV, teacher_TV, alpha=asked.alpha, temperature=TEMPERATURE)
        return whole_T, all_T
    assert isinstance(asked, LikeliestTokens)
    largest = student_TV if asked.support == "student" else teacher_TV
    support_TK = largest.topk(asked.k, dim=-1).indices
    mass_T = (student_TV / TEMPERATURE).softmax(-1).gather(1, support_TK).sum(-1)
    return top_k_definition(student_TV, teacher_TV, **vars(asked), temperature=TEMPERATURE), mass_T


LOSSES: dict[str, dict[str, Any]] = {
    "reverse KL": {"alpha": 1.0},
    "JSD": {"alpha": 0.3},
    "forward KL, top 4": {"alpha": 0.0, "top_k": 4},
    "teacher's top 4": {"top_k": 4, "top_k_rest": "renormalise", "top_k_support": "teacher"},
    "token": {"name": "token", "advantage_clip": 0.5},
    "sequence": {"name": "sequence"},
    "GRPO": {"name": "grpo"},
    "RLSD": {"name": "rlsd"},
}


@pytest.mark.parametrize("micro_batch_tokens", [5, 1000])
@pytest.mark.parametrize("blend", [0.0, 0.4])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_what_is_written_down(name: str, blend: float, micro_batch_tokens: int):
    values: dict[str, Any] = LOSSES[name]
    if values.get("name") not in ("grpo", "rlsd"):  # which have rewards of their own
        values = values | {"group_advantage_weight": blend}
    settings = loss_settings(**values)
    loss, gradient_VD, batch = learn(settings, micro_batch_tokens)
    wanted, wanted_VD, wanted_seen = expected(settings)
    assert loss == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
    assert (gradient_VD - wanted_VD).abs().max() < 1e-5 * wanted_VD.abs().max()
    computed_B = batch.seen["computed"] > 0
    assert computed_B.any() and (batch.weights_B[computed_B] > 0).all()
    for what, wanted_B in wanted_seen.items():
        of_B = computed_B & (batch.teacher_mask_B > 0) if what in ("mass", "advantage") else computed_B
        seen_B = batch.seen[what][of_B].double()
        of_own_B = torch.cat([wanted_B.split(LENGTHS)[s.id] for s in batch.samples])
        assert torch.allclose(seen_B, of_own_B[of_B].double(), rtol=1e-5, atol=1e-5), what


@pytest.mark.parametrize("micro_batch_tokens", [5, 1000])
@pytest.mark.parametrize("name", ["reverse KL", "JSD", "forward KL, top 4", "sequence", "RLSD"])
def test_what_the_student_does_not_reach_is_written_down_where_the_teacher_is_examined(
    name: str, micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    """Token by token the teacher's own share, 0 where it reads nothing; the loss stays what it is."""
    floor = 0.01
    monkeypatch.setattr(microbatch_loss, "UNREACHED", floor)
    settings = loss_settings(**LOSSES[name])
    loss, gradient_VD, batch = learn(settings, micro_batch_tokens, examined=True)
    alone, alone_VD, unexamined = learn(settings, micro_batch_tokens)
    assert loss == alone and gradient_VD.equal(alone_VD) and not unexamined.seen["unreached"].any()
    shares = []
    for s in batch.samples:
        models_TV = [
            logits([*(prompt or [])], s, HEAD_VD.double()) for prompt in (s.prompt_ids, s.teacher_prompt_ids)
        ]
        share_T = unreached_definition(*models_TV, floor=floor, temperature=TEMPERATURE)
        shares.append(share_T.where(torch.arange(len(share_T)) < s.teacher_tokens, 0.0))
    computed_B = batch.seen["computed"] > 0
    wanted_B = torch.cat(shares).where(computed_B, 0.0)
    assert torch.allclose(batch.seen["unreached"].double(), wanted_B, rtol=1e-5, atol=1e-6)
    assert 0.05 < wanted_B.max() < 1


def test_a_micro_batch_of_which_nothing_is_taught_needs_no_teacher():
    """The blend learns from its rewards alone."""
    _, _, batch = learn(loss_settings(group_advantage_weight=0.4), 5)
    of_sample_2 = slice(start_of(batch, 2), start_of(batch, 2) + LENGTHS[2])
    assert batch.seen["computed"][of_sample_2].all()
    assert not batch.seen["teacher"][of_sample_2].any() and not batch.seen["divergence"][of_sample_2].any()


@pytest.mark.parametrize(
    ("settings", "learned", "weights"),
    [
        (loss_settings(), [0, 1, 3], [8.0]),  # what is taught
        (loss_settings(group_advantage_weight=0.4), [0, 1, 2, 3], [8.0, 15.0]),
        (loss_settings("grpo"), [0, 1, 2, 3], [15.0]),  # what was better or worse than its group
        (loss_settings("rlsd"), [0, 1, 2, 3], [15.0]),
    ],
    ids=["divergence", "blend", "grpo", "rlsd"],
)
def test_only_what_has_a_gradient_is_computed_but_all_is_counted(
    settings: LossSettings, learned: list[int], weights: list[float]
):
    samples = [*SAMPLES[:4], sample(4, [4, 5, 6], None, 0.0), sample(5, [4, 5], 2, 0.5, [0, 0])]
    packer, terms = Packer(PARALLEL, micro_batch_tokens=1000, share_prefixes=True), build_terms(settings)
    (mini_batch,) = own_batch(samples, packer, terms).mini_batches
    assert [s.id for s in mini_batch.own_samples] == learned and mini_batch.plan.has_signal
    assert mini_batch.plan.term_weights == weights and mini_batch.plan.weight == max(weights)


def test_a_blends_divisor_does_not_jump_where_its_rewards_vanish():
    """A share of 1e-7 changes the loss by about as much."""
    alone, _, _ = learn(loss_settings(), 1000)
    almost, _, _ = learn(loss_settings(group_advantage_weight=1e-7), 1000)
    assert almost == pytest.approx(alone, rel=1e-5)
