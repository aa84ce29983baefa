"""The router of a layer with experts."""

import torch.nn.functional as F
from torch import Tensor

from sdpo_megatron.trainer import parallel as _  # noqa: F401  installs the CPU platform where there is no GPU

from megatron.core.transformer.moe.router import TopKRouter  # isort: skip


class ExpertRouter(TopKRouter):
    """megatron's router, whose logits are a product in the model's type, as transformers and SGLang compute them.
    megatron-core 0.16 has its own function for it, which misses a name where there is no Transformer Engine."""

    def gating(self, input: Tensor) -> Tensor:
        """Returns logits [S, 1, experts] of hidden states [S, 1, hidden]."""
        return F.linear(input, self.weight)
