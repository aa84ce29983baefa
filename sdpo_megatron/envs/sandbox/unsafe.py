"""No sandbox: programs as ordinary processes, for machines that are thrown away afterwards."""

from typing import ClassVar

from sdpo_megatron.envs.sandbox.bubblewrap import SYSTEM_PYTHON
from sdpo_megatron.envs.sandbox.kept import Kept


class UnsafeSubprocess(Kept):
    """Runs each program as the user who asks (root's as a user without rights): it reads, writes and reaches what that
    user can. Only its limits hold, and that it leaves no process behind."""

    name: ClassVar[str] = "unsafe_subprocess"

    def __init__(self, python: str = SYSTEM_PYTHON, shown: object = ()):
        """`python` is the interpreter; `shown` is what sandboxes would have to show of it."""
        super().__init__(python)
