"""Starts SGLang's HTTP server on a machine without a GPU. It runs in the server's environment, not the trainer's:

    python sglang_on_cpu.py --model-path M --device cpu --attention-backend batched_sdpa ...

The script imports nothing of sdpo_megatron. The CPU builds of sgl-kernel exist only as sources, and torchvision's wheel
does not know a CPU-only torch; SGLang imports both, but for the models that are trained here calls neither (for experts
it would: plain_parts.py). So their names are provided here, before sglang is imported, and a call that does reach one
of them says so.

SGLang starts its scheduler and detokenizer by "spawn", which runs this file again as `__mp_main__` in each
of them: what must hold there too stands at module level.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types

# our other files lie beside this one, which need not be in a package here; PYTHONSAFEPATH leaves their directory out
sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from die_with_parent import die_with  # noqa: E402  # pyright: ignore[reportMissingImports]

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
    import batched_attention  # pyright: ignore[reportMissingImports]
    import plain_parts  # pyright: ignore[reportMissingImports]

    batched_attention.register()
    plain_parts.register_sampling()
    plain_parts.register_expert_choice()


def main() -> None:
    from sglang.launch_server import run_server  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import prepare_server_args  # pyright: ignore[reportMissingImports]
    from sglang.srt.utils import kill_process_tree  # pyright: ignore[reportMissingImports]

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    check_environment()
elif __name__ == "__mp_main__":
    # SGLang arms the same signal, but only after tens of seconds of imports: a server killed while it starts would
    # leave orphans behind. The main process, this one's parent, leads the process group.
    die_with(os.getpgrp())

if __name__ in ("__main__", "__mp_main__"):
    provide_sgl_kernel()
    provide_torchvision_operators()
    provide_ours()

if __name__ == "__main__":
    main()
