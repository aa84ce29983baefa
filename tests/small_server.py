"""What a server of a tiny model is told of memory."""

from sdpo_megatron.preflight.memory import ServerMemory

MEMORY = ServerMemory(fraction=0.95, cache_tokens=16_384)
