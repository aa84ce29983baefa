"""Damaged inputs, drawn from a seed: settings, model directories, run directories."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sdpo_megatron.config import Config

ODD_TEXTS = (
    *(
        "",
        "~",
        "null",
        "true",
        "off",
        "nan",
        ".inf",
        "-1",
        "0",
        "1",
        "2",
        "1e-6",
        "1e400",
        "9" * 30,
        "9" * 400,
    ),
    *(
        "x",
        "[]",
        "{}",
        "[1]",
        "[x, y]",
        "{a: 1}",
        "[[[]]]",
        "{name: x}",
        "'\\0'",
        '"\\u0000"',
        '"\\ud800"',
        "*a",
    ),
    *(
        "&a [*a]",
        "!!python/name:os.system",
        "[",
        "{",
        "- -",
        "a: b: c",
        "\t",
        "%",
        "@",
        "`",
        "é",
        "\u202e",
        "½",
    ),
    *(
        "/dev/zero",
        "/dev/null",
        "/",
        ".",
        "..",
        "~nosuchuser",
        "~/x",
        "x" * 300,
        "a/" * 200,
        "http://[::1",
        "0x10",
    ),
    *(
        "[" * 2000,
        "{a: " * 500,
        "http://10.0.0.256:1",
        "[http://10.0.0.256:1]",
        "[http://a b]",
        "frozen",
        "grpo",
    ),
)
ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        1.5,
        -0.5,
        1e300,
        10**40,
        float("nan"),
        float("inf"),
        "",
        "x",
        "llama",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [1, 2],
        {"a": 1},
        {"rope_type": "yarn"},
        "\ud800",
        "x" * 1000,
        ["full_attention"],
    ),
)
ODD_BYTES = (
    *(b"", b"{", b"[]", b"null", b"1", b"{}", b"[" * 100_000, b"\xff\xfe\x00", b"\x00" * 100, b'{"a": NaN}'),
    *(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"9" * 5000,
        b'{"a": "\\ud800"}',
    ),
)


def keys_of(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, f"{prefix}{name}.")


def overrides(rng: random.Random) -> list[str]:
    """One to three overrides, most of a key that there is."""
    keys = [
        *keys_of(),
        "loss.alpha",
        "loss.top_k",
        "loss.name",
        "task.options.digits",
        "task.options.train_size",
    ]
    return [_override(rng, keys) for _ in range(rng.choice([1, 1, 2, 3]))]


def _override(rng: random.Random, keys: list[str]) -> str:
    key = rng.choice(keys)
    if rng.random() < 0.1:
        cut = rng.randrange(len(key) + 1)
        key = key[:cut] + rng.choice(["", ".", "=", "é", " ", "\0", "[0]", "." * 300, "x"]) + key[cut:]
    return f"{key}={rng.choice(ODD_TEXTS)}" if rng.random() < 0.97 else rng.choice(ODD_TEXTS)


def damage_file(rng: random.Random, path: Path) -> str:
    """Damages a file in one of many ways; returns in which."""
    kind = rng.choice(
        ["gone", "directory", "bytes", "cut", "flip", "insert", "value", "value", "value", "key"]
    )
    content = path.read_bytes() if path.is_file() else b""
    if kind == "gone":
        path.unlink(missing_ok=True)
    elif kind == "directory":
        path.unlink(missing_ok=True)
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(rng.choice(ODD_BYTES))
    elif kind in ("value", "key"):
        path.write_bytes(_other_value(rng, content, kind))
    else:
        at = rng.randrange(len(content) + 1)
        middle = {"cut": b"", "flip": bytes([rng.randrange(256)]), "insert": rng.randbytes(3)}[kind]
        behind = {"cut": b"", "flip": content[at + 1 :], "insert": content[at:]}[kind]
        path.write_bytes(content[:at] + middle + behind)
    return f"{kind} of {path.name}"


def _other_value(rng: random.Random, content: bytes, kind: str) -> bytes:
    """Puts an odd value, or key, somewhere into what JSON a file holds."""
    try:
        values = json.loads(content)
    except ValueError:
        return rng.choice(ODD_BYTES)
    place: Any = values
    while isinstance(place, dict | list) and place:
        keys = [*place] if isinstance(place, dict) else [*range(min(len(place), 20))]
        key = rng.choice(keys)
        if rng.random() < 0.5 or not isinstance(place[key], dict | list) or not place[key]:
            if kind == "key" and isinstance(place, dict):
                place[rng.choice(["auto_map", "rope_scaling", "x", "step", key])] = rng.choice(ODD_VALUES)
            else:
                place[key] = rng.choice(ODD_VALUES)
            break
        place = place[key]
    return json.dumps(values).encode()
