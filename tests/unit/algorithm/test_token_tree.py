import random
import time

import pytest

from sdpo_megatron.algorithm.token_tree import TokenTree, build, sort_with_overlaps


def random_sequences(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    count, vocabulary, longest = rng.randint(1, 12), rng.randint(1, 4), rng.randint(0, 8)
    base = rng.choice([0, 250, 2**16 - 2, 2**31])
    return [[base + rng.randrange(vocabulary) for _ in range(rng.randint(0, longest))] for _ in range(count)]


def path_rows(tree: TokenTree, row: int) -> list[int]:
    """Rows from the root down to `row`, by following parents."""
    bounds = tree.cu_seqlens_N1
    segment = next(n for n in range(len(tree.parents_N)) if bounds[n] <= row < bounds[n + 1])
    rows = list(range(bounds[segment], row + 1))
    while (segment := tree.parents_N[segment]) >= 0:
        rows = [*range(bounds[segment], bounds[segment + 1]), *rows]
    return rows


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(150))
def test_every_sequence_is_the_path_to_its_last_row(seed, share):
    sequences = random_sequences(seed)
    tree = build(sequences, share)
    ids, positions = tree.ids_S.tolist(), tree.positions_S.tolist()
    for sequence, rows in zip(sequences, tree.rows, strict=True):
        assert [ids[row] for row in rows] == sequence
        if len(rows):
            assert path_rows(tree, int(rows[-1])) == rows.tolist()
    for row, position in enumerate(positions):
        assert len(path_rows(tree, row)) == position + 1


@pytest.mark.parametrize("seed", range(150))
def test_shape_of_the_tree(seed):
    sequences = random_sequences(seed)
    shared, separate = build(sequences, True), build(sequences, False)
    assert len(separate.ids_S) == sum(map(len, sequences))
    assert len(shared.ids_S) == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})
    assert len(shared.parents_N) <= 2 * len(sequences) - 1
    for tree in (shared, separate):
        assert tree.cu_seqlens_N1[0] == 0 and tree.cu_seqlens_N1[-1] == len(tree.ids_S)
        assert all(a < b for a, b in zip(tree.cu_seqlens_N1[:-1], tree.cu_seqlens_N1[1:], strict=True))
        assert all(parent < n for n, parent in enumerate(tree.parents_N))
    # A run without a branch is one segment: whoever is a parent has two children or more.
    children = [shared.parents_N.count(n) for n in range(len(shared.parents_N))]
    assert 1 not in children
    # and siblings begin with different tokens
    first = [(p, shared.ids_S[shared.cu_seqlens_N1[n]].item()) for n, p in enumerate(shared.parents_N)]
    assert len(first) == len(set(first))


@pytest.mark.parametrize("seed", range(50))
def test_size_of_a_tree_from_overlaps(seed):
    sequences = random_sequences(seed)
    order, overlaps = sort_with_overlaps(sequences)
    assert [sequences[i] for i in order] == sorted(sequences)
    size = sum(len(sequences[i]) - overlap for i, overlap in zip(order, overlaps, strict=True))
    assert size == len(build(sequences, True).ids_S)


def test_a_small_tree_in_full():
    tree = build([[1, 2, 3, 4], [1, 2, 5], [1, 2], [7]], share=True)
    assert tree.ids_S.tolist() == [1, 2, 3, 4, 5, 7]
    assert tree.positions_S.tolist() == [0, 1, 2, 3, 2, 0]
    assert tree.cu_seqlens_N1 == [0, 2, 4, 5, 6]
    assert tree.parents_N == [-1, 0, 0, -1]
    assert [rows.tolist() for rows in tree.rows] == [[0, 1, 2, 3], [0, 1, 4], [0, 1], [5]]


def test_nothing():
    tree = build([], share=True)
    assert tree.ids_S.tolist() == [] and tree.cu_seqlens_N1 == [0] and tree.rows == []


def test_long_sequences_do_not_take_long():
    rng = random.Random(0)
    prompt = [rng.randrange(50_000) for _ in range(3000)]
    sequences = [prompt + [rng.randrange(50_000) for _ in range(1000)] for _ in range(256)]
    start = time.process_time()
    build(sequences, share=True)
    assert time.process_time() - start < 5  # measured: 0.4
