"""Starts SGLang's HTTP server on a machine without a GPU. It runs in the server's environment, not the trainer's:

    python sglang_on_cpu.py --model-path M --device cpu --attention-backend batched_sdpa ...

The script imports nothing of sdpo_megatron. The CPU builds of sgl-kernel exist only as sources, and torchvision's wheel
does not know a CPU-only torch; SGLang imports both, but for the models that are trained here calls neither (for experts
it would: expert_choice.py). So their names are provided here, before sglang is imported, and a call that does reach one
of them says so.

SGLang starts its scheduler and detokenizer by "spawn", which runs this file again as `__mp_main__` in each
of them: what must hold there too stands at module level.
"""

import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import signal
import sys
import types

SGLANG_VERSION = "0.5.23"
"""The version whose imports the lists below were read from."""

SGL_KERNEL_NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)
"""Names that SGLang imports at its start; speculative decoding alone uses them."""

TORCHVISION_OPERATORS = ("nms", "qnms")
"""Operators whose fake implementations torchvision registers when it is imported: they have to be defined
by then."""

PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Ties a spawned child to the server's main process from its first moment.

    SGLang arms the same signal, but only after tens of seconds of imports: a server killed while it starts
    would leave orphans behind. The main process leads the process group (`lead_process_group`), which is
    how a child knows whom to expect as parent."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # it died before the signal was armed
    if os.getppid() != os.getpgrp():
        os.kill(os.getpid(), signal.SIGKILL)


def lead_process_group() -> None:
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


def check_environment() -> None:
    found = importlib.metadata.version("sglang")
    if found != SGLANG_VERSION:
        sys.exit(
            f"error: sglang {found} is installed, but sglang_on_cpu.py provides what {SGLANG_VERSION} imports: "
            f"install sglang=={SGLANG_VERSION} (requirements-sglang-cpu-nodeps.txt)"
        )
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        sys.exit("error: SGLANG_USE_CPU_ENGINE is not 1: set it, or SGLang looks for a GPU")


def unavailable(name: str):
    def call(*_args, **_kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this machine has no sgl_kernel (sglang_on_cpu.py)"
        )

    return call


def provide_sgl_kernel() -> None:
    if importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = types.ModuleType("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    vars(module)["__version__"] = "0+names.only"
    for name in SGL_KERNEL_NAMES:
        setattr(module, name, unavailable(name))
    sys.modules["sgl_kernel"] = module


def provide_torchvision_operators() -> None:
    import torch

    for name in TORCHVISION_OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)


def provide_ours() -> None:
    # they lie beside this file, which need not be in a package here, and with PYTHONSAFEPATH is not found by itself
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import batched_attention  # pyright: ignore[reportMissingImports]
    import cdf_sampling  # pyright: ignore[reportMissingImports]
    import expert_choice  # pyright: ignore[reportMissingImports]

    batched_attention.register()
    cdf_sampling.register()
    expert_choice.register()


def main() -> None:
    from sglang.launch_server import run_server  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import prepare_server_args  # pyright: ignore[reportMissingImports]
    from sglang.srt.utils import kill_process_tree  # pyright: ignore[reportMissingImports]

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    lead_process_group()
    check_environment()
elif __name__ == "__mp_main__":
    die_with_launcher()

if __name__ in ("__main__", "__mp_main__"):
    provide_sgl_kernel()
    provide_torchvision_operators()
    provide_ours()

if __name__ == "__main__":
    main()
