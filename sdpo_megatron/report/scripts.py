"""What the browser is given: data as scripts that hold nothing but data, and the page that loads them."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from sdpo_megatron.files import write_atomically

_HERE = Path(__file__).parent
_SCRIPTS = ("core.js", "text.js", "charts.js", "lists.js", "tokens.js", "steps.js", "responses.js", "main.js")


def script(name: str, data: Any) -> str:
    """Returns the script that hands `data` to the page under this name, in ASCII.

    No text of a model can end it or begin a tag: all but ASCII is an escape, and so is `<`. Raises ValueError for a
    number that JSON does not have."""
    written = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"report({json.dumps(name)},{written});\n"


def write_script(folder: Path, name: str, data: Any) -> None:
    """Writes the script `name` to `folder`/`name`.js, whose directory must exist."""
    write_atomically(folder / f"{name}.js", script(name, data), durable=False)


def page() -> str:
    """Returns index.html. Its policy lets the browser run this page's own script and load files that lie beside it,
    and nothing else: no network, no image, no frame, no form."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    code = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    policy = "; ".join(
        (
            "default-src 'none'",
            # a file has no origin that 'self' could mean; that is for a page that a server gives
            f"script-src {_hash(code)} 'self' file:",
            f"style-src {_hash(style)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    template = (_HERE / "page.html").read_text(encoding="utf-8")
    for place, content in (("POLICY", policy), ("STYLE", style), ("SCRIPT", code)):
        template = template.replace(f"@{place}@", content)
    return template


def _hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
