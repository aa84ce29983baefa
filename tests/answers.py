"""Responses for tests of environments."""

from sdpo_megatron.records import FinishReason, Rollout


def answering(text: str, finish_reason: FinishReason = "stop") -> Rollout:
    """A response of which only the text, and why it ended, counts."""
    return Rollout(
        prompt_ids=[],
        response_ids_T=[],
        rollout_logprobs_T=[],
        loss_mask_T=[],
        weight_spans=[],
        finish_reason=finish_reason,
        text=text,
    )
