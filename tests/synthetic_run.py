"""Run directories without a run: what reports read, made in milliseconds."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdpo_megatron.records import Grade, Group, Problem, Rollout, Sample, WeightSpan
from sdpo_megatron.run_dir.records_file import MODEL_COLUMNS, StepRecord, write_record

Encode = Callable[[str], Sequence[int]]


def synthetic_run(
    path: Path,
    texts_PG: Callable[[int], list[list[str]]],
    *,
    steps: int = 3,
    recorded_groups: int = 1,
    encode: Encode = lambda text: [1 + ord(char) % 90 for char in text],
    model: str = "nowhere",
    env: str = "equations",
    feedback: str = "Write one equation.",
) -> Path:
    """Makes a run of `steps` training steps, `texts_PG(step)` being each one's responses by group: those whose place in
    their group is even are right. Each step's problems are called p0, p1, ..."""
    (path / "rollouts/train").mkdir(parents=True)
    (path / "rollouts/eval").mkdir()
    values = {
        "run": {"name": path.name, "steps": steps},
        "model": {"path": model},
        "task": {"env": env},
        "rollout": {"group_size": len(texts_PG(0)[0])},
        "reprompt": {"success_reward_threshold": 0.5},
    }
    (path / "config.json").write_text(json.dumps({"values": values}))
    rows = [json.dumps(row(step, steps)) for step in range(steps + 1)]
    (path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    for step in range(steps):
        record = step_record(texts_PG(step), step, recorded_groups, encode, feedback)
        write_record(path / f"rollouts/train/{step:06d}.jsonl", record)
    groups_P = step_record(texts_PG(0)[:1], 0, 0, encode, feedback).groups_P
    write_record(path / "rollouts/eval/000000.jsonl", StepRecord(groups_P=groups_P))
    return path


def row(step: int, steps: int) -> dict[str, Any]:
    if step == steps:
        return {"step": step, "test/avg@1": 0.75, "time/eval": 1.0, "time/total": 1.0}
    found = {
        "env/all/reward/total": step / steps,
        "env/all/response_length/mean": 20.0 + step,
        "sdpo/divergence/mean": 1 / (1 + step),
        "policy/entropy": 0.5,
        "optim/grad_norm": 2.0,
        "rollout_gap/mean": 1e-5,
        "memory/all_processes_gib": 3.0,
        "time/rollout": 5.0,
        "time/learn": 3.0,
        "time/total": 8.0,
    }
    held_out = {"test/avg@1": 0.25} if step == 0 else {}
    return {"step": step, **held_out, **found} | ({"warning/low_entropy": 1.0} if step == 1 else {})


def step_record(
    texts_PG: list[list[str]], step: int, recorded_groups: int, encode: Encode, feedback: str
) -> StepRecord:
    groups_P: list[Group] = []
    samples: list[Sample] = []
    for p, texts_G in enumerate(texts_PG):
        ids_G = [np.asarray(encode(text), np.int32) for text in texts_G]
        groups_P.append(group(p, texts_G, ids_G, step, feedback))
        samples += [
            sample(p * len(texts_G) + g, p * len(texts_G), ids_T, right=g % 2 == 0)
            for g, ids_T in enumerate(ids_G)
        ]
    recorded = sum(len(texts_G) for texts_G in texts_PG[:recorded_groups])
    tokens = sum(len(sample.response_ids_T) for sample in samples[:recorded])
    generator = np.random.default_rng(step)
    columns: dict[str, Any] = {
        name: generator.normal(size=tokens).astype(np.float32)
        for name in MODEL_COLUMNS
        if name != "old_logprobs"
    }
    return StepRecord(
        groups_P=groups_P,
        samples=samples,
        recorded=recorded,
        columns=columns | {"computed": np.ones(tokens, np.float32)},
        decode=lambda ids: f"<|im_start|>user\nSolution of {list(ids)}<|im_end|>",
    )


def group(p: int, texts_G: list[str], ids_G: list[Any], step: int, feedback: str) -> Group:
    rollouts_G = [
        Rollout(
            prompt_ids=[5, p],
            response_ids_T=ids_T,
            **per_token(len(ids_T)),
            weight_spans=[WeightSpan(start=0, end=len(ids_T), version=step)],
            finish_reason="length" if g == 1 else "stop",
            text=text,
        )
        for g, (text, ids_T) in enumerate(zip(texts_G, ids_G, strict=True))
    ]
    grades_G = [
        Grade(reward=1.0) if g % 2 == 0 else Grade(reward=0.0, feedback=feedback) for g in range(len(texts_G))
    ]
    problem = Problem(id=f"p{p}", messages=[{"role": "user", "content": f"Question {p}?"}])
    return Group(problem=problem, rollouts_G=rollouts_G, grades_G=grades_G)


def sample(number: int, first: int, ids_T: Any, *, right: bool) -> Sample:
    """The first of a group is the demonstration of the others, and has none itself."""
    untaught = number == first
    return Sample(
        id=number,
        prompt_ids=[5, first],
        response_ids_T=ids_T,
        **per_token(len(ids_T)),
        teacher_prompt_ids=None if untaught else [7, first],
        teacher_tokens=0 if untaught else max(1, len(ids_T) - 2),
        success=right,
        group_advantage=0.5 if right else -0.5,
        demonstration_id=None if untaught else first,
    )


def per_token(tokens: int) -> dict[str, Any]:
    return {
        "rollout_logprobs_T": np.full(tokens, -0.5, np.float32),
        "loss_mask_T": np.ones(tokens, np.uint8),
    }
