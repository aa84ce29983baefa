"""What settings are made of: sections with types and limits; and which section a dotted key leads to."""

from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=1 << 31)]
NonNegative = Annotated[int, Field(ge=0, lt=1 << 31)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]


class Section(BaseModel):
    """The base of all settings; the sentence under a field says what it means."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def kinds_of(model: type[BaseModel], key: str) -> dict[str, type[BaseModel]]:
    """Returns the sections that `key` may be, by what `name` says; empty where it is one or none."""
    field = model.model_fields.get(key)
    if field is None or not field.discriminator:
        return {}
    members: tuple[Any, ...] = get_args(field.annotation) or (field.annotation,)
    return {get_args(member.model_fields["name"].annotation)[0]: member for member in members}


def as_written(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Returns `path` as a user writes it: pydantic names, behind a section of several kinds, which one it is."""
    return [part for k, part in enumerate(path) if k != 1 or part not in kinds_of(model, path[0])]


def section_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """Returns the model that pydantic's `path` leads to, or None where it leads to a plain value."""
    at: Any = model
    kinds: dict[str, type[BaseModel]] = {}
    for part in path:
        if part in kinds:
            at, kinds = kinds[part], {}
        elif _is_model(at) and part in at.model_fields:
            field, kinds = at.model_fields[part], kinds_of(at, part)
            at = type(field.get_default()) if kinds else field.annotation
        else:
            at = get_args(at)[1] if get_origin(at) is dict else None
    return at if _is_model(at) else None


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
