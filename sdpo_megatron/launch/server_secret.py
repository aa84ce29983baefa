"""What a server that the launcher starts keeps to itself: a key, and a directory that nobody else may enter.

SGLang reads its key from a `--config` file, which is there only while it starts, and prints it into its log, from which
it is taken before the log is written.
"""

import secrets
import shutil
import tempfile
from pathlib import Path

from sdpo_megatron.files import write_private

HIDDEN = b"(hidden)"


def new_key() -> str:
    """Returns a key that no server had before: 64 hexadecimal digits."""
    return secrets.token_hex(32)


class PrivateDirectory:
    """A directory of mode 0700 for one start of a server: its settings, sockets and process group's store.

    It lies where temporary files do, since the name of a socket holds no more than 107 bytes."""

    def __init__(self, key: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="sdpo_server_"))
        write_private(self.settings, f"api-key: '{key}'\n")

    @property
    def settings(self) -> Path:
        """SGLang's `--config`."""
        return self.path / "settings.yaml"

    def forget_key(self) -> None:
        """Removes the settings, once the server has read them."""
        self.settings.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Redactor:
    """Takes a secret out of bytes that come piece by piece."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._held = b""

    def __call__(self, piece: bytes) -> bytes:
        """Returns what may be written now: all but an end that may be the secret's beginning."""
        text = (self._held + piece).replace(self._secret, HIDDEN)
        lengths = range(min(len(text), len(self._secret) - 1), 0, -1)
        held = next((length for length in lengths if text.endswith(self._secret[:length])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> bytes:
        """Returns what was held back, at the end."""
        return self._held
