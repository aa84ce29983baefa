"""The shell lines in front of a job's program: the site's, the package, no internet, caches on the node's disk."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from sdpo_megatron.cluster.hardware import HardwareSettings

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""What has libraries ask nobody for what is named by path: nodes have no internet, and a wait for it has no limit."""
CACHES: Mapping[str, str] = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    # DeepGEMM's too; its own kernels follow a variable of their own
    "SGLANG_CACHE_DIR": "sglang",
    "SGLANG_JIT_CACHE_DIR": "sglang_jit",
    "TVM_FFI_CACHE_DIR": "tvm_ffi",
    "TILELANG_CACHE_DIR": "tilelang",
}
"""Where trainer and servers keep compiled code: the variable, and the directory that it is given."""


def cache_variables(root: str) -> dict[str, str]:
    """Returns the variables by which all compiled code lies below `root`."""
    return {variable: f"{root}/{name}" for variable, name in CACHES.items()}


def setup_lines(hardware: HardwareSettings, *codes: Path) -> list[str]:
    """Returns the lines for a job that runs the package in its `codes`, of an array one for each of its jobs."""
    scratch = hardware.scratch or "${SLURM_TMPDIR:-/tmp}"
    quoted = [shlex.quote(str(code)) for code in codes]
    own = [f"code={quoted[0]}"]
    if len(codes) > 1:
        own = [f"codes=({' '.join(quoted)})", 'code="${codes[$SLURM_ARRAY_TASK_ID]}"']
    site = hardware.setup
    if site:
        failed = "echo \"warning: hardware.setup: '$BASH_COMMAND' failed\" >&2"
        site = [f"trap {shlex.quote(failed)} ERR", *site, "trap - ERR"]
    return [
        *site,
        *own,
        # an environment of the user's may lie on theirs
        'export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"',
        # what lies in the directory of the submission is not taken in its place
        "export PYTHONSAFEPATH=1",
        *(f"export {name}=1" for name in OFFLINE),
        # a number, since some sites hand no $USER on
        f'scratch="{scratch}/sdpo_$(id -u)"',
        *(f'export {name}="{path}"' for name, path in cache_variables("$scratch").items()),
    ]
