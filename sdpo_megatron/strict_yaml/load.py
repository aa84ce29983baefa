"""YAML files and `section.key=value` overrides become typed settings, or one line that says what to write.

Precedence: default < YAML files, left to right < overrides. Mappings are merged key by key, lists are replaced. A field
may be a union of sections that its key `name` tells apart: each has keys of its own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

import yaml
from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.files import read_text
from sdpo_megatron.strict_yaml.explain import COMMAND_LINE, DEFAULT, Origins, explain, kind_of
from sdpo_megatron.strict_yaml.section import kinds_of

DEEPEST = 50
"""Levels that keys may have."""
MOST_VALUES = 100_000
"""Keys and values that a file may come to, each as often as its aliases repeat it."""
Model = TypeVar("Model", bound=BaseModel)


def load(
    model: type[Model], paths: Sequence[str | Path], overrides: Sequence[str], renamed: Mapping[str, str]
) -> tuple[Model, Origins]:
    """Returns the settings in `paths` and `overrides` ("optimizer.lr=1e-6"; the value is YAML), and where each came
    from.

    `renamed` names keys that no longer exist, and what to write instead. Raises ConfigError for the first mistake.
    """
    values: dict[str, Any] = {}
    origins: Origins = {}
    for path in paths:
        _merge(values, _read_file(Path(path), model), str(path), origins)
        _drop_keys_of_other_kinds(model, values, str(path), origins)
    for override in overrides:
        _merge(values, _read_override(override), COMMAND_LINE, origins)
    _drop_keys_of_other_kinds(model, values, COMMAND_LINE, origins)
    for key, value in flatten(values):
        _check_text(key, value)
        for written in (key, f"{key}={value}"):
            if written in renamed:
                raise ConfigError(f"{written} is no longer a setting: {renamed[written]}.")
    loaded = parse(model, values, origins)
    return loaded, {key: origins.get(key, DEFAULT) for key, _ in flatten(loaded.model_dump())}


def parse(
    model: type[Model], values: Mapping[str, Any], origins: Mapping[str, str], prefix: str = ""
) -> Model:
    """Returns `values` as a `model`, or raises a ConfigError for the first mistake; `prefix` leads to `values`.

    It also serves settings that only their owner knows: `parse(Equations.Options, options, origins,
    "task.options")`.
    """
    try:
        return model.model_validate(_with_names(model, values))
    except ValidationError as error:
        # An unknown key first: a misspelt required key shows up as missing too, which is less help.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise ConfigError(explain(details[0], model, origins, prefix)) from None


def _with_names(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, in which a section of several kinds that does not say which is of its default's."""
    named = dict(values)
    for key, field in model.model_fields.items():
        if field.discriminator and isinstance(values.get(key), Mapping):
            named[key] = {"name": field.get_default().name, **values[key]}
    return named


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


# int before float: the first that matches wins
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
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_yaml(text: str, name: str) -> Any:
    """Returns the value that `text` spells, None for nothing. Raises ConfigError, which says `name`."""
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, name)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from None


def _check_size(root: yaml.Node, name: str) -> None:
    """A few aliases of aliases are billions of values, each of which would be merged and checked."""
    sizes: dict[yaml.Node, int] = {}

    def size(node: yaml.Node) -> int:
        if node not in sizes:
            # an alias of what it is in leads to itself
            sizes[node] = MOST_VALUES
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                inner = chain.from_iterable(inner)
            sizes[node] = 1 + sum(map(size, inner))
        return sizes[node]

    if size(root) > MOST_VALUES:
        raise ConfigError(f"{name} comes to more than {MOST_VALUES:,} keys and values; remove its aliases.")


def _read_file(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    try:
        values = parse_yaml(read_text(path), str(path))
    except FileNotFoundError:
        hint = (
            ""
            if path.suffix in (".yaml", ".yml")
            else "; a setting is written section.key=value, quoted if it has spaces"
        )
        raise ConfigError(f"There is no file {path}{hint}.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; give a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {kind_of(values)}; it must hold sections: {', '.join(model.model_fields)}."
        )
    return values


def _read_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"{quoted(override)} is not an override; write section.key=value, for example optimizer.lr=1e-6."
        )
    if len(parts) > DEEPEST:
        raise ConfigError(
            f"{quoted(override)} is {len(parts)} levels deep, but no setting is; correct its key."
        )
    value = parse_yaml(text, quoted(override))
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
        origins[f"{prefix}{key}"] = origin
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, origin, origins, f"{prefix}{key}.")
        else:
            into[key] = value


def _drop_keys_of_other_kinds(
    model: type[BaseModel], values: dict[str, Any], origin: str, origins: Origins
) -> None:
    """Drops, where `origin` names a kind of section, what others said of an earlier kind and the new one lacks."""
    for key, section in values.items():
        kinds = kinds_of(model, key)
        if kinds and isinstance(section, dict) and origins.get(f"{key}.name") == origin:
            kind = kinds.get(str(section["name"]))
            for name in list(section):
                if kind and name not in kind.model_fields and origins[f"{key}.{name}"] != origin:
                    del section[name]


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and value of every leaf; an empty mapping is a leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
