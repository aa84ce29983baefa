"""A response as the page takes it: plain JSON."""

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdpo_megatron.envs.base import Environment, Part
from sdpo_megatron.report.token_texts import TokenTexts
from sdpo_megatron.run_dir.records_file import RecordedResponse

FLAGS = (
    "right",
    "wrong",
    "ungraded",
    "truncated",
    "unfinished thought",
    "no teacher",
    "hints lost",
    "teacher cut",
    "per token",
)
"""What is said of a response in one bit each, the first in the lowest."""
_COLUMNS = {
    "student": "student_logprobs_T",
    "teacher": "teacher_logprobs_T",
    "server": "rollout_logprobs_T",
    "advantage": "advantages_T",
    "divergence": "divergence_T",
}
Render = Callable[[RecordedResponse], list[Part]]


def token_count(response: RecordedResponse) -> int:
    return max((span.end for span in response.weight_spans), default=0)


def flags_of(response: RecordedResponse, threshold: float) -> int:
    """Returns the bits of FLAGS; where the record does not say whether the response is right, its reward does."""
    tokens, graded = token_count(response), response.ungraded is None
    learned = response.teacher_tokens is not None
    recorded = response.response_ids_T is not None
    # without its prompt, no tokens of a response are the teacher's
    untaught = learned and (response.teacher_prompt is None if recorded else response.teacher_tokens == 0)
    right = (response.reward or 0.0) >= threshold if response.success is None else response.success
    holds = {
        "right": graded and right,
        "wrong": graded and not right,
        "ungraded": not graded,
        "truncated": response.finish_reason in ("length", "thinking"),
        "unfinished thought": response.finish_reason == "thinking",
        "no teacher": untaught,
        "hints lost": bool(response.hints_lost),
        "teacher cut": learned and not untaught and (response.teacher_tokens or 0) < tokens,
        "per token": recorded,
    }
    return sum(holds[flag] << bit for bit, flag in enumerate(FLAGS))


def mean_of(numbers_T: Any) -> float | None:
    """Returns the mean of the numbers that were computed, in four digits."""
    if numbers_T is None or not np.isfinite(numbers_T).any():
        return None
    return float(f"{np.mean(numbers_T[np.isfinite(numbers_T)]):.4g}")


def divergence_of(response: RecordedResponse) -> float | None:
    """Returns the mean divergence from the teacher; None where there was none, which left zeros behind."""
    return None if response.teacher_prompt is None else mean_of(response.divergence_T)


def response_page(
    number: int, response: RecordedResponse, render: Render | None, texts: TokenTexts | None
) -> dict[str, Any]:
    """Returns all that is shown of one response; `render` is the environment's, None where it has none of its own."""
    shown: dict[str, Any] = {
        "number": number,
        "finish": response.finish_reason,
        "spans": [[span.start, span.end, span.version] for span in response.weight_spans],
        "tokens": token_count(response),
        "groupAdvantage": response.group_advantage,
        "demonstration": response.demonstration_id,
        "teacherTokens": response.teacher_tokens,
        "metrics": list(response.metrics.items()),
    }
    for name in ("thought", "answer", "response", "reward", "feedback", "ungraded", "teacher_prompt"):
        shown[name] = getattr(response, name)
    if render is not None:
        try:
            shown["parts"] = [[part.kind, part.title, part.text] for part in render(response)]
        # an environment's own code: whatever it raises costs this response its parts alone
        except Exception as error:
            shown["note"] = f"The environment cannot render this response: {type(error).__name__}: {error}"
    if response.response_ids_T is not None:
        shown["columns"] = _columns_of(response, len(response.response_ids_T))
        if texts is not None:
            shown["texts"] = texts.of(response.response_ids_T.tolist())
    return shown


def own_render(environment: type[Environment]) -> Render | None:
    """Returns how this environment renders, None where that is the default: its text is there already."""
    same = getattr(environment.render, "__func__", None) is Environment.render.__func__
    return None if same else environment.render


def _columns_of(response: RecordedResponse, tokens: int) -> dict[str, str]:
    """Returns float32 in base64 by name, NaN where nothing was computed; a third of their size in digits."""
    found = {}
    for name, column in _COLUMNS.items():
        numbers: Sequence[float] | None = getattr(response, column)
        if numbers is not None and np.isfinite(numbers).any():
            padded = np.full(tokens, np.nan, "<f4")
            padded[: len(numbers)] = numbers
            found[name] = base64.b64encode(padded.tobytes()).decode()
    if response.loss_mask_T is not None and not np.all(response.loss_mask_T):
        found["mask"] = base64.b64encode(response.loss_mask_T.astype(np.uint8).tobytes()).decode()
    return found
