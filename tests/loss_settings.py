"""Settings of a loss by the words of a YAML file."""

from typing import Any

from sdpo_megatron.algorithm.losses import LOSSES
from sdpo_megatron.algorithm.losses.base import LossSettings

KINDS = {loss.Settings.model_fields["name"].default: loss.Settings for loss in LOSSES}


def loss_settings(name: str = "divergence", **values: Any) -> LossSettings:
    return KINDS[name](**values)
