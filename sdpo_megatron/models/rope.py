"""What a config.json says of the rotary embedding: its base, and how its frequencies are scaled for long contexts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.models.config_values import positive, whole
from sdpo_megatron.models.families.base import Field


@dataclass(frozen=True, kw_only=True)
class LinearRope:
    """All frequencies divided by one number, as in models of Llama 2 for longer contexts."""

    rope_type: ClassVar[str] = "linear"
    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """Frequency scaling of arXiv 2309.00071, which also sharpens attention: by ln(factor) / 10 + 1 in queries and
    keys."""

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


RopeScaling = LinearRope | Llama3Rope | YarnRope
KINDS: dict[str, type[RopeScaling]] = {kind.rope_type: kind for kind in (LinearRope, Llama3Rope, YarnRope)}
"""What config.json calls them."""
YARN_KEYS = frozenset(
    ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings")
    + ("beta_fast", "beta_slow", "attention_factor", "truncate")
)


def read_rope(values: Mapping[str, Any], of_theta: Field, file: Path) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of the rotary embedding. Raises ConfigError where one is not supported.

    transformers 5 keeps both in `rope_parameters`; older directories have `rope_theta` and `rope_scaling`,
    whose type was at first called `type`.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    source = rope if rope.get(of_theta.key) is not None else values
    theta = positive(source, of_theta, file)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{file}: partial_rotary_factor is {quoted(rope['partial_rotary_factor'])}, which is not supported; "
            "supported: 1.0."
        )
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(factor=_stretching(rope, kind, file))
    if kind == "llama3":
        return theta, _llama3(rope, file)
    if kind == "yarn":
        return theta, _yarn(rope, file)
    raise ConfigError(
        f"{file}: rope type {quoted(kind)} is not supported; supported: {', '.join(['default', *KINDS])}."
    )


def _stretching(rope: Mapping[str, Any], kind: str, file: Path) -> float:
    """Returns the factor of a rope that must not be below 1: SGLang 0.5.23 makes a linear one a table that is too
    short then, and goes on behind its end without the factor."""
    factor = positive(rope, Field("factor"), file)
    if factor < 1.0:
        raise ConfigError(f"{file}: factor is {factor:g}; it must be 1 or more in a rope of type '{kind}'.")
    return factor


def _llama3(rope: Mapping[str, Any], file: Path) -> Llama3Rope:
    scaling = Llama3Rope(
        factor=positive(rope, Field("factor"), file),
        low_freq_factor=positive(rope, Field("low_freq_factor"), file),
        high_freq_factor=positive(rope, Field("high_freq_factor"), file),
        original_max_position_embeddings=whole(rope, Field("original_max_position_embeddings"), file),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(
            f"{file}: low_freq_factor is {scaling.low_freq_factor:g}; it must be below "
            f"high_freq_factor={scaling.high_freq_factor:g}."
        )
    return scaling


def _yarn(rope: Mapping[str, Any], file: Path) -> YarnRope:
    """What transformers and SGLang 0.5.23 compute alike: the one reads `mscale` where it stands beside
    `mscale_all_dim` and `attention_factor`, the other `attn_factor` and `extrapolation_factor`."""
    for key in rope.keys() - YARN_KEYS:
        if rope[key] is not None:
            raise ConfigError(
                f"{file}: {key} is {quoted(rope[key])} in a rope of type 'yarn', which is not supported; remove it "
                "where the model needs none."
            )
    scaling = YarnRope(
        factor=_stretching(rope, "yarn", file),
        original_max_position_embeddings=whole(rope, Field("original_max_position_embeddings"), file),
        beta_fast=positive(rope, Field("beta_fast", default=32.0), file),
        beta_slow=positive(rope, Field("beta_slow", default=1.0), file),
    )
    if scaling.beta_slow >= scaling.beta_fast:
        raise ConfigError(
            f"{file}: beta_slow is {scaling.beta_slow:g}; it must be below beta_fast={scaling.beta_fast:g}."
        )
    sharpening = 0.1 * math.log(scaling.factor) + 1.0
    said = positive(rope, Field("attention_factor", default=sharpening), file)
    if not math.isclose(said, sharpening, rel_tol=1e-6):
        raise ConfigError(
            f"{file}: attention_factor is {said:g}, but SGLang computes with ln(factor) / 10 + 1 = {sharpening:g}; "
            "other values are not supported."
        )
    if rope.get("truncate") not in (None, True):
        raise ConfigError(
            f"{file}: truncate is {quoted(rope['truncate'])}, which is not supported; supported: true."
        )
    return scaling


def with_flat_ropes(values: Mapping[str, Any], of_sliding: Field, file: Path) -> Mapping[str, Any]:
    """Returns `values` of a model with a rope for each kind of layer, both where files before transformers 5 have them:
    of layers with a window that is a base alone, and SGLang reads no more. Raises ConfigError where there is more."""
    ropes = values.get("rope_parameters")
    if not ropes:
        return values
    kinds = ("sliding_attention", "full_attention")
    if ropes.keys() != set(kinds) or not all(isinstance(rope, dict) for rope in ropes.values()):
        raise ConfigError(
            f"{file}: rope_parameters is {quoted(ropes)}; it must hold a JSON object for each of {' and '.join(kinds)}."
        )
    sliding, full = (ropes[kind] for kind in kinds)
    theta, scaling = read_rope({"rope_parameters": sliding}, Field("rope_theta", of_sliding.default), file)
    if scaling is not None:
        raise ConfigError(
            f"{file}: rope type {quoted(scaling.rope_type)} of layers with a window is not supported; supported: "
            "default."
        )
    said = values.get(of_sliding.key)
    if "rope_theta" not in sliding:
        theta = said
    elif said not in (None, theta):
        raise ConfigError(
            f"{file}: {of_sliding.key} is {quoted(said)} in config.json itself and {quoted(theta)} in rope_parameters; "
            "keep the right one."
        )
    return {**values, "rope_parameters": full, of_sliding.key: theta}


def refuse_two_ropes(values: Mapping[str, Any], file: Path) -> None:
    """Raises ConfigError where two places say two things of the rotary embedding: who reads takes the one or the
    other."""
    places = {name: values.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    said: dict[str, tuple[str, Any]] = {}
    for name, place in {"config.json itself": values, **places}.items():
        keys = ("rope_theta", "original_max_position_embeddings")
        found = {key: place.get(key) for key in keys}
        if place and place is not values:
            found["rope_type"] = place.get("rope_type") or place.get("type") or "default"
        for key, value in found.items():
            if value is None:
                continue
            where, first = said.setdefault(key, (name, value))
            if first != value:
                raise ConfigError(
                    f"{file}: {key} is {quoted(first)} in {where} and {quoted(value)} in {name}; keep the right one."
                )
