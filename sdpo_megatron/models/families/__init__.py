"""The families of models by the architecture that config.json names. A new one is a file here and an entry in FAMILIES;
the tests walk this registry."""

from sdpo_megatron.models.families.decoder import Family
from sdpo_megatron.models.families.gemma import GEMMA3
from sdpo_megatron.models.families.llama import LLAMA
from sdpo_megatron.models.families.mistral import MISTRAL
from sdpo_megatron.models.families.olmo import OLMO2, OLMO3
from sdpo_megatron.models.families.qwen2 import QWEN2
from sdpo_megatron.models.families.qwen3 import QWEN3, QWEN3_MOE

__all__ = ["FAMILIES", "Family"]

FAMILIES = {
    family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, OLMO2, OLMO3, GEMMA3)
}
