"""A mistake in settings, as pydantic reports it, in one line that says what to write instead."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from sdpo_megatron.errors import quoted
from sdpo_megatron.strict_yaml.section import as_written, kinds_of, section_at

COMMAND_LINE = "command line"
DEFAULT = "default"

Origins = dict[str, str]
"""Dotted key of every value -> "default", the file as it was named, or "command line"."""

EXPECTED = {
    "float_type": "it must be a number.",
    "int_type": "it must be a whole number.",
    "int_from_float": "it must be a whole number.",
    "string_type": "it must be text (in quotes if it looks like something else).",
    "bool_type": "it must be true or false.",
    "list_type": "it must be a list, for example [a, b].",
    "dict_type": "it must be a mapping, for example {{key: value}}.",
    "finite_number": "it must be finite.",
    "greater_than": "it must be greater than {gt:.12g}.",
    "greater_than_equal": "it must be at least {ge:.12g}.",
    "less_than": "it must be less than {lt:.12g}.",
    "less_than_equal": "it must be at most {le:.12g}.",
    "literal_error": "it must be {expected}.",
    "string_pattern_mismatch": "it must match {pattern}.",
    "too_short": "it must have at least {min_length}.",
    "string_too_long": "it must have at most {max_length} characters.",
}


def explain(detail: ErrorDetails, model: type[BaseModel], origins: Mapping[str, str], prefix: str) -> str:
    parts = [str(part) for part in detail["loc"]]
    section, written = section_at(model, parts), as_written(model, parts)
    dotted = ".".join([prefix, *written] if prefix else written)
    if detail["type"] == "extra_forbidden":
        return _unknown_key(parts, model, origins, prefix)
    context = detail.get("ctx", {})
    # a section's own check, in its own words
    if detail["type"] == "value_error":
        return f"{context['error']}."
    if detail["type"] == "union_tag_invalid":
        dotted, names = f"{dotted}.name", " or ".join(context["expected_tags"].rsplit(", ", 1))
        value = detail["input"]["name"]
        return f"{dotted} is {quoted(value)} ({kind_of(value)}, from {_origin(dotted, origins)}); it must be {names}."
    if detail["type"] == "missing":
        if section:
            has = ", ".join(section.model_fields)
            return f"Missing section '{dotted}': add it to the YAML file; it has: {has}."
        return f"Missing key '{dotted}': set it in a YAML file or as {dotted}=VALUE."
    value = detail["input"]
    if detail["type"] in ("model_type", "model_attributes_type") and section:
        expected = f"it must be a section that has: {', '.join(section.model_fields)}."
    elif detail["type"] in EXPECTED:
        expected = EXPECTED[detail["type"]].format(**context)
    else:
        expected = " ".join(detail["msg"].split()) + "."
    if value is None:
        return f"{dotted} is nothing; {expected}"
    return f"{dotted} is {quoted(value)} ({kind_of(value)}, from {_origin(dotted, origins)}); {expected}"


def _unknown_key(parts: list[str], model: type[BaseModel], origins: Mapping[str, str], prefix: str) -> str:
    *path, wrong = parts
    section, written = section_at(model, path), as_written(model, path)
    known = list(section.model_fields) if section else []
    where = ".".join([prefix, *written] if prefix else written)

    def full(key: str) -> str:
        return f"{where}.{key}" if where else key

    kinds = kinds_of(model, path[0]) if len(path) > 1 else {}
    others = [name for name, kind in kinds.items() if wrong in kind.model_fields]
    if others:
        return (
            f"{full(wrong)} means nothing with {full('name')}={path[1]}; it belongs to {', '.join(others)}. "
            f"Remove it, or set {full('name')}."
        )
    close = [full(key) for key in difflib.get_close_matches(wrong, known, n=1)]
    # it may be the right key in the wrong section
    if not close:
        elsewhere = [key for key in _field_names(model) if key.rpartition(".")[2] == wrong]
        close = [f"{prefix}.{key}" if prefix else key for key in elsewhere[:1]]
    meant = f" Did you mean '{close[0]}'?" if close else ""
    kind = f" (name={path[1]})" if kinds else ""
    origin = origins.get(full(wrong), COMMAND_LINE)
    file = "" if origin == COMMAND_LINE else f" in {origin}"
    return (
        f"Unknown key '{full(wrong)}'{file}.{meant} {where or 'The top level'}{kind} has: {', '.join(known)}."
    )


def _field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key in model.model_fields:
        for section in kinds_of(model, key).values() or [section_at(model, [key])]:
            if section:
                yield from _field_names(section, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"


def kind_of(value: Any) -> str:
    names = {
        str: "text",
        bool: "true or false",
        int: "whole number",
        float: "number",
        list: "list",
        dict: "mapping",
    }
    return names.get(type(value), type(value).__name__)


def _origin(dotted: str, origins: Mapping[str, str]) -> str:
    """Says where the value of `dotted` came from; for an element of a list, where the list came from."""
    while dotted not in origins and "." in dotted:
        dotted = dotted.rpartition(".")[0]
    origin = origins.get(dotted, DEFAULT)
    return f"the {origin}" if origin in (COMMAND_LINE, DEFAULT) else origin
