"""YAML files and `section.key=value` overrides -> Config, or one line that says what to write.

Precedence: default < YAML files, left to right < overrides. Mappings are merged key by key, lists are
replaced.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

import yaml
from sdpo_megatron.config import SECRETS, Config
from sdpo_megatron.errors import ConfigError, quoted

COMMAND_LINE = "command line"
DEFAULT = "default"

Origins = dict[str, str]
"""Dotted key of every value -> "default", the file as it was named, or "command line"."""

Model = TypeVar("Model", bound=BaseModel)


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> tuple[Config, Origins]:
    """The settings in `paths` and `overrides` ("optimizer.lr=1e-6"; the value is YAML), and where each came
    from.

    Raises ConfigError for the first mistake.
    """
    values: dict[str, Any] = {}
    origins: Origins = {}
    for path in paths:
        _merge(values, _read_file(Path(path)), str(path), origins)
    for override in overrides:
        _merge(values, _read_override(override), COMMAND_LINE, origins)
    for key, value in flatten(values):
        _check_text(key, value)
    config = parse(Config, values, origins)
    return config, {key: origins.get(key, DEFAULT) for key, _ in flatten(config.model_dump())}


def parse(
    model: type[Model], values: Mapping[str, Any], origins: Mapping[str, str], prefix: str = ""
) -> Model:
    """`values` as a `model`, or a ConfigError for the first mistake, where `prefix` leads to `values`.

    Also for settings that only their owner knows: `parse(Equations.Options, options, origins,
    "task.options")`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # An unknown key first: a misspelt required key shows up as missing too, which is less help.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise ConfigError(_explain(details[0], model, origins, prefix)) from None


# Reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars in place of 1.1's, under which 1e-6 is text and `off` is false; no key twice, no tags."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            line, written = event.start_mark.line + 1, tag.replace("tag:yaml.org,2002:", "!!")
            raise ConfigError(f"{self.name} line {line}: the tag {written} means nothing here; remove it.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{self.name} line {line}: this key is not text; put it in quotes.")
            if key_node.value in lines:
                first = lines[key_node.value]
                raise ConfigError(
                    f"{self.name} line {line}: key '{key_node.value}' is given twice (first on line "
                    f"{first}); keep one."
                )
            lines[key_node.value] = line
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


for _tag, _pattern, _first in [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
]:  # int before float: the first that matches wins
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _to_float(node.value))


def _to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _parse_yaml(text: str, name: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from None
    finally:
        if loader is not None:
            loader.dispose()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        hint = (
            ""
            if path.suffix in (".yaml", ".yml")
            else "; a setting is written section.key=value, quoted if it has spaces"
        )
        raise ConfigError(f"There is no file {path}{hint}.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; give a YAML file.") from None
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigError(f"{path}: not a text file in UTF-8: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {_kind(values)}; it must hold sections: {', '.join(Config.model_fields)}."
        )
    return values


def _read_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"{quoted(override)} is not an override; write section.key=value, for example optimizer.lr=1e-6."
        )
    value = _parse_yaml(text, "server.api_key" if key in SECRETS else quoted(override))
    for part in reversed(parts):
        value = {part: value}
    return value


def _check_text(key: str, value: Any) -> None:
    """Escapes in quotes can spell text that no file, argument or tokenizer takes."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
            raise ConfigError(f"{key} holds a NUL or half a character (a surrogate); remove it.")


def _merge(
    into: dict[str, Any], values: Mapping[str, Any], origin: str, origins: Origins, prefix: str = ""
) -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            origins[dotted] = origin
            _merge(into[key], value, origin, origins, f"{dotted}.")
        else:
            into[key] = value
            origins[dotted] = origin


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; an empty mapping is a leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Explaining

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


def _explain(detail: ErrorDetails, model: type[BaseModel], origins: Mapping[str, str], prefix: str) -> str:
    parts = [str(part) for part in detail["loc"]]
    dotted = ".".join([prefix, *parts] if prefix else parts)
    if detail["type"] == "extra_forbidden":
        return _unknown_key(parts, model, prefix)
    section = _section(model, parts)
    if detail["type"] == "missing":
        if section:
            has = ", ".join(section.model_fields)
            return f"Missing section '{dotted}': add it to the YAML file; it has: {has}."
        return f"Missing key '{dotted}': set it in a YAML file or as {dotted}=VALUE."
    value = detail["input"]
    if detail["type"] in ("model_type", "model_attributes_type") and section:
        expected = f"it must be a section that has: {', '.join(section.model_fields)}."
    elif detail["type"] in EXPECTED:
        expected = EXPECTED[detail["type"]].format(**detail.get("ctx", {}))
    else:
        expected = " ".join(detail["msg"].split()) + "."
    if value is None:
        return f"{dotted} is nothing; {expected}"
    found = "not shown" if dotted in SECRETS else quoted(value)
    return f"{dotted} is {found} ({_kind(value)}, from {_origin(dotted, origins)}); {expected}"


def _unknown_key(parts: list[str], model: type[BaseModel], prefix: str) -> str:
    *path, wrong = parts
    section = _section(model, path)
    known = list(section.model_fields) if section else []
    where = ".".join([prefix, *path] if prefix else path)

    def full(key: str) -> str:
        return f"{where}.{key}" if where else key

    close = [full(key) for key in difflib.get_close_matches(wrong, known, n=1)]
    if not close:  # the right key in the wrong section
        elsewhere = [key for key in _field_names(model) if key.rpartition(".")[2] == wrong]
        close = [f"{prefix}.{key}" if prefix else key for key in elsewhere[:1]]
    meant = f" Did you mean '{close[0]}'?" if close else ""
    return f"Unknown key '{full(wrong)}'.{meant} {where or 'The top level'} has: {', '.join(known)}."


def _section(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The model that `path` leads to, or None where it leads to a plain value."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not _is_section(model, part):
            return None
        assert isinstance(field.annotation, type)
        model = field.annotation
    return model


def _is_section(model: type[BaseModel], key: str) -> bool:
    annotation = model.model_fields[key].annotation
    return (
        get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)
    )


def _field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key in model.model_fields:
        section = _section(model, [key])
        if section:
            yield from _field_names(section, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _kind(value: Any) -> str:
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
    """Where the value of `dotted` came from; for an element of a list, where the list came from."""
    while dotted not in origins and "." in dotted:
        dotted = dotted.rpartition(".")[0]
    origin = origins.get(dotted, DEFAULT)
    return f"the {origin}" if origin in (COMMAND_LINE, DEFAULT) else origin
