"""LiveCodeBench's private tests: JSON, or JSON in a pickle in zlib in base64."""

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any, NoReturn

MOST_BYTES = 1 << 30


class _TextOnly(pickle.Unpickler):
    """A pickle of a text needs no name of any module, and one that names something may run it."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}; a list of tests does not")


def unpacked(text: str) -> Any:
    """Returns the tests. Raises ValueError that says what is wrong."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        inflated = zlib.decompressobj()
        data = inflated.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
        if inflated.unconsumed_tail:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        packed = _TextOnly(io.BytesIO(data)).load()
        return json.loads(packed) if isinstance(packed, (str, bytes)) else packed
    except (binascii.Error, zlib.error, ValueError, RecursionError, EOFError) as error:
        raise ValueError(f"neither JSON nor a packed list of tests ({error})") from None
    except (pickle.UnpicklingError, AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"a pickle that is no list of tests ({error})") from None
