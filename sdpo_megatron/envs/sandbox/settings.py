"""What a run may say about its sandbox."""

from typing import Literal, Self

from pydantic import model_validator

from sdpo_megatron.strict_yaml.section import Positive, Section


class SandboxSettings(Section):
    backend: Literal["auto", "bubblewrap", "sandlock", "http", "unsafe_subprocess"] = "auto"
    """What runs programs that the model writes. `auto` takes the first of bubblewrap, sandlock and, with a `url`, http
    that ran a probe on this machine. `unsafe_subprocess` confines nothing."""
    url: str | None = None
    """The address of a service with SandboxFusion's interface, for `http`."""
    memory_mib: Positive = 1024
    """Address space of each process of a program, and size of all that it writes."""
    processes: Positive = 16
    """Processes and threads of a program at one time."""
    output_kib: Positive = 1024
    """What a program may print; one that prints more is ended."""
    file_mib: Positive = 16
    """Size of each file that a program writes."""

    @model_validator(mode="after")
    def _address(self) -> Self:
        if self.backend == "http" and self.url is None:
            raise ValueError("sandbox.backend http needs the service's address: set task.options.sandbox.url")
        if self.url is not None and self.backend not in ("http", "auto"):
            raise ValueError(f"url is of backend http; with backend {self.backend} leave it out")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"task.options.sandbox.url {self.url!r} must begin with http:// or https://")
        return self
