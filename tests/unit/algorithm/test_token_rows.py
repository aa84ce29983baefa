"""Rows of equal tokens: the same, in the same order, as torch.unique over rows of keys makes them."""

import pytest
import torch

from sdpo_megatron.algorithm import token_rows as module
from sdpo_megatron.algorithm.token_rows import token_rows


@pytest.mark.parametrize(
    "sizes", [(5, 1, 1, 7), (1,), (3, 4, 5, 6), (1 << 31, 1, 1 << 31), (1 << 40, 3, 1 << 22), (1 << 62, 9)]
)
@pytest.mark.parametrize("tokens", [0, 1, 400])
def test_rows_are_those_of_unique(sizes: tuple[int, ...], tokens: int):
    draw = torch.Generator().manual_seed(0)
    few_T = torch.randint(0, 20, (tokens,), generator=draw)
    keys_T = [torch.randint(0, size, (20,), generator=draw)[few_T] for size in sizes]
    rows = token_rows(*keys_T)
    keys_UK, row_T = torch.unique(torch.stack(keys_T, dim=1), dim=0, return_inverse=True)
    assert rows.keys_UK.dtype == torch.int64 and torch.equal(rows.keys_UK, keys_UK)
    assert torch.equal(rows.row_T, row_T.sort(stable=True).values)
    assert torch.equal(rows.order_T, row_T.argsort(stable=True))
    for u in range(len(keys_UK)):
        tokens_of_row = rows.tokens(slice(u, u + 1))
        assert torch.equal(rows.order_T[tokens_of_row], (row_T == u).nonzero()[:, 0])


def test_one_number_is_taken_only_where_it_fits(monkeypatch: pytest.MonkeyPatch):
    """The largest keys there are: their joined number is 2^63 - 1 at most, or the plain way is taken."""
    taken = []
    joined = module._distinct
    monkeypatch.setattr(module, "_distinct", lambda *keys: taken.append(1) or joined(*keys))
    fits = [torch.tensor([0, (1 << 62) - 1]), torch.tensor([1, 0])]
    assert token_rows(*fits).keys_UK.tolist() == [[0, 1], [(1 << 62) - 1, 0]] and taken == []
    fits = [torch.tensor([0, (1 << 62) - 2]), torch.tensor([1, 0])]
    assert token_rows(*fits).keys_UK.tolist() == [[0, 1], [(1 << 62) - 2, 0]] and taken == [1]
