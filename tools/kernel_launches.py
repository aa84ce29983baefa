"""Every Triton kernel, as the package launches it, and how many tensors of the logits' size it reads and writes."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from sdpo_megatron.kernels import divergence_triton, softmax_triton
from sdpo_megatron.kernels.rows import LogitRows, RowDivergence

KERNELS = {
    "sweep": (1, 0),
    "gradient": (1, 1),
    "joint_sweep_forward": (2, 0),
    "joint_sweep_reverse": (2, 0),
    "mixture": (2, 0),
    "divergence_gradient_forward": (2, 1),
    "divergence_gradient_mixture": (2, 1),
    "divergence_gradient_reverse": (2, 1),
}


def launches(logits: LogitRows, rows: RowDivergence, slope_U: Tensor) -> dict[str, Callable[[], object]]:
    """Returns the launch of each of KERNELS; gradient kernels write over the student's logits."""
    joint_sweep = partial(divergence_triton.joint_sweep_triton, logits)
    gradient = partial(divergence_triton.write_gradient_triton, logits, rows, slope_U, slope_U)
    return {
        "sweep": partial(softmax_triton.sweep_triton, logits.student_UV, logits.target_U, logits.shard),
        "gradient": partial(
            softmax_triton.write_gradient_triton,
            logits.student_UV,
            rows.student,
            logits.target_U,
            slope_U,
            slope_U,
            logits.shard,
        ),
        "joint_sweep_forward": partial(joint_sweep, forward=True),
        "joint_sweep_reverse": partial(joint_sweep, forward=False),
        "mixture": partial(divergence_triton.mixture_triton, logits, rows.student, rows.teacher, 0.5),
        "divergence_gradient_forward": partial(gradient, alpha=0.0),
        "divergence_gradient_mixture": partial(gradient, alpha=0.5),
        "divergence_gradient_reverse": partial(gradient, alpha=1.0),
    }
