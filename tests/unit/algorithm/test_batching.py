import random

import pytest
import torch

from sdpo_megatron.algorithm.batching import (
    View,
    _Run,
    microbatch,
    pack,
    split_mini_batches,
    student_views,
    teacher_views,
)
from sdpo_megatron.algorithm.token_tree import build, sort_with_overlaps
from sdpo_megatron.records import Sample


def sample(id: int, prompt=(1, 2), response=(3, 4, 5), teacher=None, teacher_tokens=0) -> Sample:
    return Sample(
        id=id,
        prompt_ids=list(prompt),
        response_ids_T=list(response),
        rollout_logprobs_T=[-1.0] * len(response),
        loss_mask_T=[1] * len(response),
        teacher_prompt_ids=teacher,
        teacher_tokens=teacher_tokens,
        success=False,
        group_advantage=0.0,
    )


def step_views(problems: int, group_size: int, shared: int, own: int, response: int, seed=0) -> list[View]:
    """Problems share `shared` tokens, siblings `own` more; then come `response` random tokens."""
    rng = random.Random(seed)

    def draw(n: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(n)]

    examples = draw(shared)
    views: list[View] = []
    for _ in range(problems):
        prompt = examples + draw(own)
        for _ in range(group_size):
            views.append(View(len(views), prompt, draw(response)))
    return views


def cost(views, ids) -> int:
    by_id = {v.sample_id: v for v in views}
    return len(build([by_id[i].input_ids() for i in ids], True).ids_S)


def test_views():
    samples = [
        sample(0, teacher=[9, 9], teacher_tokens=2),
        sample(1, teacher=[9], teacher_tokens=0),
        sample(2),
        sample(3, response=()),
    ]
    assert [v.sample_id for v in student_views(samples)] == [0, 1, 2]
    assert teacher_views(samples) == [View(0, [9, 9], [3, 4])]
    assert View(0, [1, 2], [3, 4, 5]).input_ids().tolist() == [1, 2, 3, 4]


def test_a_token_is_predicted_at_the_row_of_the_token_before_it():
    views = [View(5, [1, 2], [3, 4, 5]), View(6, [1, 2], [3, 7]), View(9, [1], [8])]
    batch = microbatch(views, share=True)
    assert batch.sample_ids == [5, 6, 9]
    assert batch.ids_S.tolist() == [1, 2, 3, 4]  # the last tokens, 5, 7 and 8, are never read
    assert batch.positions_S.tolist() == [0, 1, 2, 3]
    assert (batch.cu_seqlens_N1, batch.parents_N) == ([0, 4], [-1])
    assert batch.place_H[batch.hidden_row_M].tolist() == [1, 2, 3, 1, 2, 0]
    assert batch.place_H.tolist() == [0, 1, 2, 3]
    assert batch.targets_M.tolist() == [3, 4, 5, 3, 7, 8]
    assert batch.sample_M.tolist() == [5, 5, 5, 6, 6, 9]
    assert batch.index_M.tolist() == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("share", [True, False])
def test_rows_hold_the_whole_context_of_every_token(share):
    for seed in range(40):
        rng = random.Random(seed)
        views = [
            View(
                k, [rng.randrange(2) for _ in range(rng.randint(1, 3))], [rng.randrange(3) for _ in range(4)]
            )
            for k in range(rng.randint(1, 8))
        ]
        batch = microbatch(views, share)
        places, ids, positions = batch.place_H.tolist(), batch.ids_S.tolist(), batch.positions_S.tolist()
        assert places == sorted(set(places)), seed
        for m in range(len(batch.targets_M)):
            view, at = views[int(batch.sample_M[m])], int(batch.index_M[m])
            context = [*view.prompt_ids, *view.response_ids_T][: len(view.prompt_ids) + at]
            place = places[int(batch.hidden_row_M[m])]
            assert int(batch.targets_M[m]) == view.response_ids_T[at], seed
            assert positions[place] == len(context) - 1 and ids[place] == context[-1], seed
        assert len(batch.targets_M) == sum(len(v.response_ids_T) for v in views), seed


def test_a_microbatch_without_views_is_one_token_without_loss():
    batch = microbatch([], share=True)
    assert len(batch.ids_S) == 1 and batch.cu_seqlens_N1 == [0, 1] and batch.parents_N == [-1]
    for empty in (batch.place_H, batch.hidden_row_M, batch.targets_M, batch.sample_M, batch.index_M):
        assert len(empty) == 0 and empty.dtype == torch.int64


def test_a_view_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="Sample 3 has an empty prompt"):
        microbatch([View(3, [], [1])])


@pytest.mark.parametrize("share", [True, False])
def test_packing_keeps_every_view_once_within_the_budget_and_ranks_in_step(share):
    for seed in range(60):
        rng = random.Random(seed)
        views = step_views(
            rng.randint(1, 6), rng.randint(1, 4), rng.randint(0, 9), 4, rng.randint(1, 9), seed
        )
        budget, dp = rng.randint(5, 120), rng.randint(1, 4)
        ranks = pack(views, budget, dp, share)
        assert len(ranks) == dp and len({len(rank) for rank in ranks}) == 1, seed
        packed = sorted(i for rank in ranks for chunk in rank for i in chunk)
        assert packed == [v.sample_id for v in views], seed
        for chunk in [chunk for rank in ranks for chunk in rank if len(chunk) > 1]:
            tokens = sum(len(views[i].input_ids()) for i in chunk)
            assert (cost(views, chunk) if share else tokens) <= budget, seed
        empty = sum(not chunk for rank in ranks for chunk in rank)
        assert not empty or len(views) < len(ranks[0]) * dp, seed


def test_the_budget_counts_a_common_beginning_once():
    views = step_views(4, 8, 50, 10, 5)
    needed = cost(views, range(32))
    assert len(pack(views, needed, 1)[0]) == 1
    assert len(pack(views, needed - 1, 1)[0]) == 2
    assert len(pack(views, needed, 1, share=False)[0]) > 4


def test_siblings_stay_together_whatever_the_order():
    views = step_views(8, 8, 20, 30, 10)
    shuffled = random.Random(1).sample(views, len(views))
    budget = cost(views, range(16)) + 40  # two groups and a bit
    (chunks,) = pack(shuffled, budget, 1)
    assert len(chunks) == 4
    for chunk in chunks:
        assert all(len([i for i in chunk if i // 8 == p]) in (0, 8) for p in range(8))


def test_a_micro_batch_ends_between_problems_where_that_leaves_it_full_enough():
    views = step_views(8, 8, 20, 30, 10)
    order, overlaps = sort_with_overlaps([v.input_ids() for v in views])
    run = _Run([len(views[i].input_ids()) for i in order], overlaps)
    assert run.cut(run.cost(0, 19)) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert run.cut(run.cost(0, 12))[0] == (0, 12)  # 8 of 12 are too few


def test_large_and_small_micro_batches_meet_on_one_rank():
    views = [View(n, [n] * n, [1]) for n in (10, 20, 70, 80)]
    assert pack(views, budget=1, dp=2) == [[[80], [10]], [[70], [20]]]


def test_ranks_are_balanced():
    views = step_views(13, 8, 40, 10, 25, seed=3)
    ranks = pack(views, 700, 4)
    loads = [sum(cost(views, chunk) for chunk in rank) for rank in ranks]
    assert max(loads) < 1.15 * min(loads)
    assert all(
        [cost(views, c) for c in rank] == sorted((cost(views, c) for c in rank), reverse=True)
        for rank in ranks
    )


def test_a_view_beyond_the_budget_is_alone():
    views = [View(0, [1] * 50, [2, 2]), View(1, [3] * 5, [2, 2]), View(2, [3] * 5, [4, 4])]
    assert sorted(pack(views, 10, 1)[0]) == [[0], [1, 2]]


def test_fewer_views_than_ranks_leave_empty_micro_batches():
    ranks = pack(step_views(1, 2, 3, 3, 3), 100, 4)
    assert sorted(len(chunk) for (chunk,) in ranks) == [0, 0, 1, 1]
    assert pack([], 100, 3) == [[], [], []]


def test_mini_batches_are_made_of_whole_problems():
    samples = [sample(i) for i in range(5 * 3)]
    parts = split_mini_batches(samples, group_size=3, count=2)
    assert [[s.id for s in part] for part in parts] == [list(range(9)), list(range(9, 15))]
    assert split_mini_batches(samples, 3, 1) == [samples]
