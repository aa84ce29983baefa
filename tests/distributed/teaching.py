"""What ranks run: each kind of teacher against its definition, and each together with each objective."""

import math
from typing import Any

import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import teacher_views
from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.trainer.hf_weights import stream_hf_weights
from sdpo_megatron.trainer.optimizer import parts_of
from sdpo_megatron.trainer.parallel import initialize
from sdpo_megatron.trainer.ragged import Ragged
from tests.distributed.learning import Trainer, read_samples
from tests.gathered import by_sample, flat

RATE = 0.3


def weights_of(chunks: list[torch.nn.Module]) -> list[Tensor]:
    """In the order of the network, which wrapping does not change."""
    return [parameter.detach().clone() for parameter in chunks[0].parameters()]


def average_follows_the_policy(model: str, samples: str, layout: dict[str, Any], cadence: str) -> float:
    """The largest difference of the teacher's weights from (1 - rate) average + rate policy, over two batches of two
    optimizer steps."""
    trainer = Trainer(
        model,
        layout,
        mini_batches=2,
        teacher={"name": "ema", "ema_rate": RATE, "ema_every": cadence},
    )
    assert trainer.teacher is not None and trainer.teacher.own is not None
    expected = [p.double() for p in weights_of(trainer.chunks)]
    update_after = trainer.teacher.update_after

    def following(after: Any) -> None:
        update_after(after)
        if after == cadence:
            for i, now in enumerate(weights_of(trainer.chunks)):
                expected[i] = (1 - RATE) * expected[i] + RATE * now.double()

    trainer.teacher.update_after = following  # type: ignore[method-assign]
    for step in range(2):
        trainer.step(read_samples(samples), step)
    taught = weights_of(trainer.teacher.own.chunks)
    moved = max(float((p - q).abs().max()) for p, q in zip(taught, weights_of(trainer.chunks), strict=True))
    assert moved > 1e-3, "the policy has not moved away from its average"
    return max(float((t.double() - p).abs().max()) for t, p in zip(taught, expected, strict=True))


def share_of_weights_whose_average_moved(model: str, samples: str, layout: dict[str, Any]) -> float:
    """Of those that moved themselves, in one step of a bfloat16 policy; each exactly by rate * move in float32."""
    rate = 0.01
    teacher = {"name": "ema", "ema_rate": rate}
    trainer = Trainer(model, layout, teacher=teacher, optimizer={"lr": 1e-4}, dtype=torch.bfloat16)
    before = [{main: main.detach().clone() for main in part.average} for part in parts_of(trainer.optimizer)]
    trainer.step(read_samples(samples))
    moved = total = 0
    for part, old in zip(parts_of(trainer.optimizer), before, strict=True):
        for main, average in part.average.items():
            assert average.dtype == torch.float32
            assert torch.equal(average, old[main].lerp(main.detach(), rate))
            went = main.detach() != old[main]
            moved += int((average != old[main])[went].sum())
            total += int(went.sum())
    assert total > 1000
    return moved / total


def mixture(model: str, samples: str, layout: dict[str, Any], mix: float) -> dict[str, Any]:
    """The teacher's log-probabilities after one step, and the policy's weights then, by Hugging Face name."""
    trainer = Trainer(model, layout, teacher={"name": "trust_region", "trust_region_mix": mix})
    batch = read_samples(samples)
    trainer.step(batch)
    stage = {
        name: t.tolist() for name, t in stream_hf_weights(trainer.chunks, trainer.shape, trainer.parallel)
    }
    weights: dict[str, Any] = {}
    for part in trainer.parallel.gather(stage if trainer.parallel.leads_stage else {}):
        weights |= part
    second, _ = trainer.step(batch, 1)
    seen = flat(second, trainer.parallel, batch)
    return {"teacher": by_sample(seen, "teacher", batch), "weights": weights}


def live_teacher_is_the_policy_of_the_moment(model: str, samples: str, layout: dict[str, Any]) -> float:
    """The largest difference of what it says from what the policy says right before each mini-batch is learned."""
    trainer = Trainer(model, layout, mini_batches=2, teacher={"name": "live"})
    assert trainer.teacher is not None
    expected: dict[int, Tensor] = {}
    teach = trainer.teacher.teach
    everything = read_samples(samples)
    whole = Ragged([len(sample.response_ids_T) for sample in everything])

    def teaching(own: Any, ragged: Any) -> Any:
        part = everything[: 8 if not expected else 16][-8:]
        expected[len(expected)] = trainer.policy.logprobs(teacher_views(part), whole)
        return teach(own, ragged)

    trainer.teacher.teach = teaching  # type: ignore[method-assign]
    batch, _ = trainer.step(everything)
    assert not torch.equal(expected[0], expected[1])
    seen = flat(batch, trainer.parallel, everything)
    if not trainer.parallel.is_main:
        return 0.0
    says = seen["teacher"]
    spoken = (says != 0) & (seen["computed"] > 0)
    assert spoken.any()
    return float((says - expected[0] - expected[1])[spoken].abs().max())


def every_objective_with_every_teacher(
    model: str, samples: str, layout: dict[str, Any], objectives: list[dict], teachers: list[dict]
) -> list[list[float]]:
    """Losses of two steps of each; one process group for all of them."""
    parallel = initialize(ParallelSettings(**layout), device=torch.device("cpu"), seed=1)
    losses = []
    for loss in objectives:
        for teacher in teachers:
            trainer = Trainer(
                model, layout, loss=loss, teacher=teacher, parallel=parallel, optimizer={"lr": 1e-3}
            )
            steps = [trainer.step(read_samples(samples), step)[1] for step in range(2)]
            assert all(math.isfinite(m["loss"]) and m["optim/grad_norm"] > 0 for m in steps), (loss, teacher)
            losses.append([metrics["loss"] for metrics in steps])
    return losses
