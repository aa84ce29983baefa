"""What a number was measured with. Two numbers compare only where all parts of their rulers are the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.version import grader_version
from sdpo_megatron.errors import UserError
from sdpo_megatron.models.weight_files import weights_sha256
from sdpo_megatron.records import Problem
from sdpo_megatron.run_dir.evaluations_file import Ruler
from sdpo_megatron.run_dir.export_record import exported_base

if TYPE_CHECKING:
    # its transformers takes seconds, which tools that compare rulers would wait for
    from sdpo_megatron.chat import Chat

SHOWN = 12
"""Digits of a SHA-256 that a ruler has: enough to tell any two apart, few enough to read."""


def rendered(problems: Sequence[Problem], chat: "Chat") -> str:
    """Returns the SHA-256 of the prompts' bytes as the model reads them."""
    return digest(*(chat.prompt_text(problem.messages, problem.tools) for problem in problems))


def data(problems: Sequence[Problem], env: Environment) -> str:
    """Returns how many problems there are, and the SHA-256 of their ids and of what their grader compares with."""
    return f"{len(problems)} problems, {digest(*(f'{p.id} {env.answer_key(p)}' for p in problems))}"


def grader(name: str, env: Environment, success_threshold: float) -> str:
    """Returns the grader's name, version and options; where data lie is not one of them."""
    options = getattr(env, "options", None)
    values = {} if options is None else options.model_dump(mode="json")
    own = {key: value for key, value in values.items() if not key.endswith("_file") and key != "fields"}
    return f"{name} {grader_version(type(env))}, options {_short(own)}, right from {success_threshold:g} on"


def thinking(problems: Sequence[Problem], chat: "Chat") -> str:
    """Returns whether the template begins thoughts, and what it was told."""
    first = chat.prompt_ids(problems[0].messages, problems[0].tools) if problems else []
    begun = "begins thoughts" if chat.opens_thought(first) else "begins no thought"
    return f"{digest(chat.template)}, {begun}, arguments {_short(chat.template_arguments)}"


def base_model(directory: Path) -> str:
    """Returns the SHA-256 of the weights that the training of those in a Hugging Face directory began with: of
    themselves, unless they are an export."""
    return (exported_base(directory) or weights_sha256(directory))[:SHOWN]


def differences(one: Ruler, other: Ruler) -> list[str]:
    """Returns, a line for each, the parts in which two rulers differ, with what either says."""
    parts = dict.fromkeys([*one, *other])
    return [
        f"{part}: {one.get(part, 'not recorded')} and {other.get(part, 'not recorded')}"
        for part in parts
        if one.get(part) != other.get(part)
    ]


def check_same_ruler(rulers: Mapping[str, Ruler], anyway: bool = False) -> dict[str, str]:
    """Returns, by name, what each ruler has other than the first one; empty where all are the same.

    Raises UserError for the first that differs, unless the numbers are to be shown `anyway`."""
    unlike: dict[str, str] = {}
    names = list(rulers)
    for name in names[1:]:
        found = differences(rulers[names[0]], rulers[name])
        if found and not anyway:
            raise UserError(
                f"{names[0]} and {name} were not measured alike, in {'; '.join(found)}. Evaluate both with one ruler, "
                "or give --anyway to see them marked."
            )
        if found:
            unlike[name] = f"measured otherwise than {names[0]}, in {'; '.join(found)}"
    return unlike


def digest(*texts: str) -> str:
    """Returns the first digits of a SHA-256 over texts, which knows where each ends."""
    sha = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        sha.update(f"{len(data)}\n".encode() + data)
    return sha.hexdigest()[:SHOWN]


def _short(values: Mapping[str, object]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False) if values else "none"
