"""The registered families, by what transformers calls them: a new one takes part in every test that walks this."""

import transformers

from sdpo_megatron.models.families import FAMILIES

MODEL_TYPES = [getattr(transformers, architecture).config_class.model_type for architecture in FAMILIES]
