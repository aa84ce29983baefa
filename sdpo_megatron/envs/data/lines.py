"""One row of a file of problems, under our names or through a mapping from somebody else's."""

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sdpo_megatron.errors import UserError, quoted

Fields = TypeVar("Fields", bound=BaseModel)

LABELS = ("domain", "difficulty")
"""What any row may say of its problem, for an evaluation to group by."""
_MOST_COLUMNS = 20
"""Columns that a message lists."""


class Row(BaseModel):
    """The base of what a published file's lines hold; what else is in a line is passed over. The lines of users' own
    files are Sections, in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Named(NamedTuple):
    """Where the user named a file, and how its columns are called there; for messages."""

    paths: str = "task.options"
    fields: str = "task.options.fields"

    def written(self, mapping: Mapping[str, str]) -> str:
        """Returns a mapping as the user writes it there."""
        if self.fields.startswith("--"):
            return f"{self.fields} " + ",".join(f"{ours}={theirs}" for ours, theirs in mapping.items())
        return f"{self.fields}={{{', '.join(f'{ours}: {theirs}' for ours, theirs in mapping.items())}}}"


IN_OPTIONS = Named()


@dataclass(frozen=True)
class Line:
    """One row that is not blank."""

    where: str
    """File and line, as messages begin with."""
    number: int
    """From 1 on."""
    values: dict[str, Any]
    """By our names where `mapping` has one."""
    mapping: Mapping[str, str] = field(default_factory=dict)
    """Our name -> the column's."""
    columns: Collection[str] = ()
    """As the file calls them."""
    text_only: bool = False
    """Whether the file can hold nothing but text, as CSV does: numbers and lists are then read from it."""
    named: Named = IN_OPTIONS

    def fields(self, model: type[Fields]) -> Fields:
        """Returns the line as that model has it, or raises a UserError that names file, line and field."""
        known = [*model.model_fields, *LABELS]
        strict = model.model_config.get("extra") == "forbid"
        wrong = [key for key in self.mapping if key not in known]
        # with a mapping, what it does not name is somebody else's and passed over
        if strict and not self.mapping:
            wrong = [key for key in self.values if key not in known]
        if wrong:
            names = ", ".join(model.model_fields)
            raise UserError(
                f"{self.where}: unknown key '{wrong[0]}'.{_meant(wrong[0], known)} Known: {names}. {self.shown()}"
            )
        values = {key: value for key, value in self.values.items() if key in model.model_fields or not strict}
        try:
            return self._read(model, values)
        except ValidationError as error:
            raise UserError(f"{self.where}: {self._first_mistake(error, known)}") from None

    def with_values(self, values: dict[str, Any]) -> "Line":
        """Returns the line as if it held these, under our names."""
        return replace(self, values=values, mapping={})

    def name(self, *names: str | int | None) -> str:
        """Returns the first of the row's own names that it has, or its number."""
        return str(next((name for name in names if name is not None), self.number))

    def labels(self) -> dict[str, str]:
        """Returns those of LABELS that the row has; a number becomes text."""
        found: dict[str, str] = {}
        for key in LABELS:
            value = self.values.get(key)
            if value is None or value == "":
                continue
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise UserError(f"{self.where}: '{key}' is {quoted(value)}; write text or a number.")
            found[key] = str(value)
        return found

    def _read(self, model: type[Fields], values: dict[str, Any]) -> Fields:
        if not self.text_only:
            return model.model_validate(values)
        try:
            return model.model_validate(values, strict=False)
        except ValidationError as error:
            lists = {
                str(detail["loc"][0]) for detail in error.errors() if detail["type"] in _WANTS_JSON
            } & values.keys()
            return model.model_validate(values | {key: _json(values[key]) for key in lists}, strict=False)

    def _first_mistake(self, error: ValidationError, known: Collection[str]) -> str:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "missing":
            unknown = [name for name in self.values if name not in known]
            close = difflib.get_close_matches(key, unknown, n=1)
            advice = f"is it '{close[0]}'?" if close else "add it."
            return f"'{key}' is missing; {advice} {self.shown(key, *close)}"
        return f"'{key}' is {quoted(detail['input'])}: {detail['msg'][:1].lower()}{detail['msg'][1:]}."

    def shown(self, ours: str = "prompt", theirs: str = "...") -> str:
        """Returns a sentence with the mapping in use and the file's columns, for messages about what is missing."""
        listed = _listed(self.columns)
        if self.mapping:
            return f"In use is {self.named.written(self.mapping)}; the columns are {listed}."
        return f"The columns are {listed}; {self.named.written({ours: theirs})} maps one."


def mapped(
    values: dict[str, Any], columns: Collection[str], mapping: Mapping[str, str], where: str, named: Named
) -> dict[str, Any]:
    """Returns a row's values by our names. Raises UserError for a column that is not there."""
    if not mapping:
        return values
    for ours, theirs in mapping.items():
        if theirs not in columns:
            raise UserError(
                f"{where}: {named.fields} reads {ours} from '{theirs}', but there is no such column."
                f"{_meant(theirs, columns)} The columns are {_listed(columns)}."
            )
    taken = {*mapping, *mapping.values()}
    rest = {key: value for key, value in values.items() if key not in taken}
    return rest | {ours: values[theirs] for ours, theirs in mapping.items() if theirs in values}


def _listed(columns: Collection[str]) -> str:
    return ", ".join([*columns][:_MOST_COLUMNS]) + (", ..." if len(columns) > _MOST_COLUMNS else "")


_WANTS_JSON = {"list_type", "dict_type", "model_type", "model_attributes_type"}


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


def _meant(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
