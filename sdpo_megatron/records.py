"""The records that one training step passes along, and the legend of shape letters.

Shape letters end the names of tensors and of ragged lists, logical axes only:

    P  problems of one step               S  tokens of one packed micro-batch
    G  responses to one problem           N  segments of one packed micro-batch
    T  response tokens of one response,   H  its hidden states that predict a response token
       or whatever tokens a function      M  its response tokens
       is given                           L  those of them that are learned from
    B  response tokens of a whole batch   U  distinct questions to the models; see algorithm/token_rows.py
    K  likeliest tokens of a row          V  vocabulary (this rank's shard)      D  hidden size
    J  these K and, last, all others      R  kept rows of hidden states; tensor-parallel ranks

Records are frozen: a later phase makes a new record, it does not fill in an earlier one.
All log-probabilities are natural logarithms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

FinishReason = Literal["stop", "length", "abort", "thinking"]
"""Why a response ended: by itself, at its longest, by the server; `thinking` where that was inside a thought."""


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the policy is asked."""

    id: str
    """Unique within its data set."""
    messages: list[Message]
    """The conversation so far; ends with a user turn. May hold worked examples as earlier turns."""
    answer: str = ""
    """The canonical response text, or the value that the grader compares with."""
    grader: str = ""
    """Name of the grader in envs.GRADERS; empty where the environment has only one."""
    canonical: bool = False
    """True where `answer` is the one right response, word for word: its probability can then be measured."""
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Schemas of tools, as the chat template takes them; the student's prompt has them, and the teacher's."""


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a teacher is told that its student does not know; at least one of solution and feedback is given."""

    solution: str | None = None
    """A successful answer to the problem, without thoughts."""
    feedback: str | None = None
    """What the environment says about the response that the teacher reads, which failed."""
    attempt: str | None = None
    """That response's answer, where it is shown beside its feedback."""


@dataclass(frozen=True, kw_only=True)
class WeightSpan:
    """Response tokens [start, end) that were sampled from one version of the policy's weights."""

    start: int
    end: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response. Token ids and log-probabilities are the server's; nothing is tokenised again. What it has
    per token are arrays of int32, float32 and uint8."""

    prompt_ids: Sequence[int]
    response_ids_T: Sequence[int]
    rollout_logprobs_T: Sequence[float]
    """The sampling policy's log-probabilities, at the sampling temperature."""
    loss_mask_T: Sequence[int]
    """1 where the token is trained, 0 where it is not."""
    weight_spans: list[WeightSpan]
    finish_reason: FinishReason
    text: str
    """The answer, decoded without thoughts and special tokens: what graders read and siblings are shown. Empty where
    the response ended inside a thought."""
    thought: str = ""
    """What the model thought before it answered, decoded likewise."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    reward: float
    """A number in [0, 1]; success is `reward >= reprompt.success_reward_threshold`."""
    feedback: str = ""
    """What the environment says about a response that failed; empty if nothing."""
    correct_format: bool = True
    answer: str | None = None
    """What the response answers, the same text for equal answers, of which evaluation takes the commonest; empty for no
    answer, None where the environment does not say."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name; the step reports their means over the responses that have them."""


@dataclass(frozen=True, kw_only=True)
class Ungraded:
    """A response that could not be graded, for a reason that is not its own. Nothing is learned from it."""

    rollout: Rollout
    cause: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """One problem and its G responses, or those of them that could be graded."""

    problem: Problem
    rollouts_G: list[Rollout]
    grades_G: list[Grade] = field(default_factory=list)
    """One for each rollout; empty until they are graded."""
    ungraded: Mapping[int, Ungraded] = field(default_factory=dict)
    """The others, by their places among the G responses."""

    @property
    def size(self) -> int:
        """G: the number of responses, graded or not."""
        return len(self.rollouts_G) + len(self.ungraded)

    @property
    def places_G(self) -> list[int]:
        """The place of each response in `rollouts_G` among the G responses."""
        return [g for g in range(self.size) if g not in self.ungraded]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response, ready to be scored and learned from. What it has per token are sequences of plain numbers: arrays
    where it is made, views of one buffer where it came from rank 0 (trainer/sample_buffer.py)."""

    id: int
    """Position in the step's batch: p * G + g."""
    prompt_ids: Sequence[int]
    response_ids_T: Sequence[int]
    rollout_logprobs_T: Sequence[float]
    loss_mask_T: Sequence[int]
    teacher_prompt_ids: Sequence[int] | None
    """The teacher's prompt; None where the teacher would know nothing that the student does not: such a response gets
    no SDPO loss."""
    teacher_tokens: int
    """Response tokens [0, teacher_tokens) fit into the teacher's context; the rest has advantage 0."""
    success: bool
    """Whether the response's reward reaches reprompt.success_reward_threshold."""
    group_advantage: float
    """The reward minus the group's mean reward (GRPO without division by the standard deviation)."""
    demonstration_id: int | None = None
    """The sample whose response the teacher was shown as the solution; None for none."""
    hints_lost: bool = False
    """Whether the teacher was told less than was to be said, or nothing, because its prompt had no room."""
