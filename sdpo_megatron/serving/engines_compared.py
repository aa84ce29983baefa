"""Server against trainer on the same tokens, token by token and by depth: do both compute the same model?

Two kinds of tokens: those of texts that the server reads at once (its prefill), and those that it samples one by one
(its decoding, with a cache), which is what training learns from. The difference is held against what the model's own
type makes of these tokens, as the canary is (`canary.py`); here at each depth too, since a wrong position or rope is
nothing at the begin of a text and everything at its end, and of both engines, since either may be wrong.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from sdpo_megatron.algorithm.learning_metrics import DEPTHS
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.wire import encoded_prompt
from sdpo_megatron.serving.canary import FLOAT32, Noise
from sdpo_megatron.trainer.alone import AloneModel

Part = Literal["read", "sampled"]
Pair = tuple[list[int], list[int]]
"""The ids of a beginning, and those behind it that are scored."""

SHORT_TEXTS, SHORT_TOKENS, BEGIN_TOKENS = 4, 64, 24
"""Beside the long text: so many others, how long, and how much of each the server samples behind."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a text, by server and trainer."""

    part: Part
    text: int
    """Which of the texts."""
    place: int
    """Its distance from the text's begin."""
    id: int
    server: float
    """Its log-probability by the server, in nats."""
    trainer: float
    float32: float
    """The same weights' by the trainer in float32."""
    server_likeliest: int | None
    """What the server finds likeliest in its place; None where it was not asked."""
    trainer_likeliest: int
    margin: float
    """By how many nats the trainer finds its likeliest above the second."""

    @property
    def gap(self) -> float:
        gap = abs(self.server - self.trainer)
        return math.inf if math.isnan(gap) else gap


@dataclass(frozen=True, kw_only=True)
class Row:
    """Some of the tokens together."""

    part: Part
    first: int
    """The place from which on they lie."""
    last: int | None
    """The place before which they lie; None: all of that part, however deep."""
    tokens: int
    gap: Noise
    largest: float
    allowed: Noise
    """So much is explained by rounding; the quantile is held against it in rows of all depths alone."""
    asked: int
    """Of so many tokens both said what is likeliest."""
    agreed: int
    margin: float
    """The largest margin of the trainer where they say different tokens; rounding turns small ones over."""
    apart: bool


@dataclass(frozen=True)
class Verdict:
    rows: list[Row]
    reasons: list[str]
    """Why server and trainer are apart, a line each; empty where they agree."""

    @property
    def agree(self) -> bool:
        return not self.reasons


def texts_of(ids: Sequence[int], longest: int) -> list[list[int]]:
    """Cuts the ids of a text into one of `longest` tokens and SHORT_TEXTS short ones from other places. Raises
    UserError where there are too few."""
    short = min(SHORT_TOKENS, longest)
    needed = longest + SHORT_TEXTS * short
    if len(ids) < needed:
        raise UserError(
            f"the text has {len(ids)} tokens, of which {needed} are needed; give a longer one, or less --tokens."
        )
    starts = range(longest, needed, short)
    return [list(ids[:longest]), *(list(ids[start : start + short]) for start in starts)]


def compare_engines(
    model: AloneModel,
    client: Client,
    texts: Sequence[Sequence[int]],
    sampled_tokens: int,
    eos_ids: Sequence[int],
) -> list[Token]:
    """Scores `texts` by both; then has the server sample `sampled_tokens` behind the begin of each short one, until one
    of `eos_ids`, and scores those too. Raises what the client raises."""
    read: list[Pair] = [([text[0]], list(text[1:])) for text in texts]
    ranked = [client.ranked_prompt(text) for text in texts]
    tokens = _tokens("read", read, [logprobs for logprobs, _ in ranked], [ids for _, ids in ranked], model)
    begins = [list(text[:BEGIN_TOKENS]) for text in texts[1:]]
    samples = asyncio.run(_sampled(client, begins, sampled_tokens, eos_ids))
    pairs = [(begin, ids) for begin, (ids, _) in zip(begins, samples, strict=True)]
    return tokens + _tokens("sampled", pairs, [logprobs for _, logprobs in samples], None, model)


def judge(tokens: Sequence[Token], factor: float) -> Verdict:
    """Holds the tokens of each part, together and by depth, against `factor` times what rounding makes of them."""
    rows: list[Row] = []
    for part in get_args(Part):
        own = [token for token in tokens if token.part == part]
        noise = _noise(own) if own else FLOAT32
        for first, last in [*pairwise((*DEPTHS, 1 << 31)), (0, None)]:
            here = [t for t in own if t.place >= first and (last is None or t.place < last)]
            if here:
                rows.append(_row(part, first, last, here, noise, factor))
    return Verdict(rows, [_reason(row) for row in rows if row.apart])


def description(tokens: Sequence[Token], verdict: Verdict) -> dict[str, Any]:
    """Returns all of it, JSON-serialisable."""
    return {"agree": verdict.agree, **asdict(verdict), "tokens": [asdict(token) for token in tokens]}


def _noise(tokens: Sequence[Token]) -> Noise:
    """What rounding makes of the tokens: how far trainer and server are from float32, the smaller of the two, since one
    that is wrong is far."""
    wide_T = [t.float32 for t in tokens]
    own = Noise.between([t.trainer for t in tokens], wide_T)
    other = Noise.between([t.server for t in tokens], wide_T)
    return Noise(min(own.mean, other.mean), min(own.high, other.high)).at_least(FLOAT32)


def _row(
    part: Part, first: int, last: int | None, tokens: Sequence[Token], noise: Noise, factor: float
) -> Row:
    gap = Noise.between([t.server for t in tokens], [t.trainer for t in tokens])
    # a few tokens may have had luck
    noise = noise.at_least(_noise(tokens))
    allowed = Noise(factor * noise.mean, factor * noise.high)
    asked = [t for t in tokens if t.server_likeliest is not None]
    unlike = [t for t in asked if t.server_likeliest != t.trainer_likeliest]
    return Row(
        part=part,
        first=first,
        last=last,
        tokens=len(tokens),
        gap=gap,
        largest=max(t.gap for t in tokens),
        allowed=allowed,
        asked=len(asked),
        agreed=len(asked) - len(unlike),
        margin=max((t.margin for t in unlike), default=0.0),
        apart=gap.beyond(noise, factor) if last is None else gap.mean > allowed.mean,
    )


def _reason(row: Row) -> str:
    where = "" if row.last is None else f" from place {row.first} on"
    return (
        f"on the {row.tokens} tokens {row.part}{where} they differ by {row.gap.mean:.2g} nats in the mean and by "
        f"{row.gap.high:.2g} on a tenth of them; rounding explains {row.allowed.mean:.2g} and {row.allowed.high:.2g}"
    )


def _tokens(
    part: Part,
    pairs: Sequence[Pair],
    server: Sequence[Sequence[float]],
    likeliest: Sequence[Sequence[int]] | None,
    model: AloneModel,
) -> list[Token]:
    scored = model.scores(pairs)
    wide = model.float32_logprobs(pairs, scored)
    tokens: list[Token] = []
    for text, ((begin, ids), own) in enumerate(zip(pairs, scored, strict=True)):
        if len(ids) != len(server[text]):
            raise RunFailed(f"The server scored {len(server[text])} of {len(ids)} tokens; see its log.")
        for t, token_id in enumerate(ids):
            tokens.append(
                Token(
                    part=part,
                    text=text,
                    place=len(begin) + t,
                    id=int(token_id),
                    server=float(server[text][t]),
                    trainer=own.logprobs_T[t],
                    float32=wide[text][t],
                    server_likeliest=None if likeliest is None else likeliest[text][t],
                    trainer_likeliest=own.likeliest_T[t],
                    margin=own.margins_T[t],
                )
            )
    return tokens


async def _sampled(
    client: Client, begins: Sequence[list[int]], tokens: int, eos_ids: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    async with client.session() as session:
        asked = [
            client.generate(
                session,
                encoded_prompt(begin),
                temperature=1.0,
                top_p=1.0,
                max_tokens=tokens,
                stop_token_ids=eos_ids,
            )
            for begin in begins
        ]
        return [(list(one.ids_T), list(one.logprobs_T)) for one in await asyncio.gather(*asked)]


def load_tokenizer(directory: Path) -> Any:
    """Returns the tokenizer in `directory`; no code that lies there is run."""
    # takes seconds to import
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def text_ids(tokenizer: Any, text: str, vocab: int) -> list[int]:
    """Returns the ids of a text. Raises UserError where it has some that a model of `vocab` tokens does not."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if max(ids, default=0) >= vocab:
        raise UserError(
            f"The tokenizer in {tokenizer.name_or_path} has token ids up to {max(ids)}, but config.json says "
            f"vocab_size {vocab}: take the tokenizer that belongs to the model."
        )
    return ids
