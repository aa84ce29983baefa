"""Tokens about which the models are asked the same question share a row, so that it is asked once."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """U distinct keys, and tokens sorted by their key."""

    keys_UK: Tensor
    """int64, sorted."""
    order_T: Tensor
    """Which of the given tokens comes t-th."""
    row_T: Tensor
    """Which key the t-th token has; it never decreases with t."""
    starts: list[int]
    """The first token of each row; one entry more than rows."""

    def tokens(self, rows: slice) -> slice:
        """Returns which of the sorted tokens belong to these consecutive rows."""
        return slice(self.starts[rows.start], self.starts[rows.stop])


def token_rows(*keys_T: Tensor) -> TokenRows:
    """Sorts tokens into rows by their keys, which may have several parts, int64 [T] each."""
    keys_UK, row_T = torch.unique(torch.stack(keys_T, dim=1), dim=0, return_inverse=True)
    order_T = row_T.argsort(stable=True)
    starts = torch.searchsorted(row_T[order_T], torch.arange(len(keys_UK) + 1)).tolist()
    return TokenRows(keys_UK, order_T, row_T[order_T], starts)
