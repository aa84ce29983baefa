"""Tokenizer, chat template and every conversation that a run will ask, before anything is started: each problem is
rendered once and its length looked at. What was found in order is remembered by content, in the user's cache."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from sdpo_megatron.config import EvalSettings, RolloutSettings
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.errors import ConfigError, UserError, quoted
from sdpo_megatron.models.resolved import check_resolved
from sdpo_megatron.preflight.boundary import reading
from sdpo_megatron.preflight.findings import Asked, digest_of, is_known, remember
from sdpo_megatron.problems import canonical, evaluated
from sdpo_megatron.records import Message, Problem
from sdpo_megatron.terminal import Screen

if TYPE_CHECKING:
    # transformers takes seconds to import
    from sdpo_megatron.chat import Chat
    from sdpo_megatron.preflight.checked import Checked

SHOWN_ABOVE = 20_000
"""Problems from which on a bar shows how far it is."""
AT_ONCE = 1_000
"""Conversations that are tokenised together."""
COMPARED = 20_000
"""The first problems whose conversations are compared with each other."""
TEMPLATE_LIMIT_S = 5.0
"""How long AT_ONCE conversations may take to render: a hundred times what they mostly take."""
TOKENIZER_LIMIT_S = 60.0
_MARGIN = 64
"""Tokens that a tokenizer may add to as many as a text has bytes: a space at its begin, say."""


def asked_by(
    env: Environment, suite_envs: Mapping[str, Environment], evaluation: EvalSettings, *, trains: bool
) -> list[Asked]:
    """Returns what a run asks, or an evaluation alone."""
    held_out = env.test_problems()
    tested = Asked(
        key="task",
        problems=list(held_out[: evaluation.problems]),
        exact=canonical(held_out)[: evaluation.exact_problems],
    )
    asked = [Asked(key="task", problems=env.train_problems()), tested] if trains else [tested]
    for name, suite in evaluation.suites.items():
        own = evaluation.of_suite(suite)
        problems = evaluated(
            suite_envs[name].test_problems(), suite_envs[name].train_problems(), own.problems
        )
        asked.append(Asked(key=f"eval.suites.{name}.task", problems=problems, suite=suite))
    return asked


def check_conversations(checked: "Checked", announce: Callable[[str], None], *, trains: bool = True) -> None:
    """Raises UserError, with the id of a problem where it is one's, unless the model's tokenizer loads, its template
    renders every problem that a run asks, or an evaluation alone, differently for different ones and with every
    argument of some effect, and each is short enough for `model.max_context_length` and has ids of the model's
    vocabulary alone; and transformers reads the model as this package does."""
    directory, shape, config = checked.model_directory, checked.shape, checked.config
    rollout, longest, vocab = config.rollout, config.model.max_context_length, shape.vocab
    asked = asked_by(checked.env, checked.suite_envs, config.eval, trains=trains)
    total = sum(len(a.problems) for a in asked)
    if total > SHOWN_ABOVE:
        announce(f"Reading {total:,} problems as the model will, once")
    prompts = [None if a.suite is None else [a.suite.system_prompt] for a in asked]
    settings = [repr(shape), longest, rollout.system_prompt, rollout.chat_template_kwargs, prompts]
    digest = digest_of(directory, settings, asked)
    if is_known(digest):
        return
    # takes seconds to import
    from sdpo_megatron.chat import build_chat

    with reading(f"{directory / 'config.json'} by transformers", TOKENIZER_LIMIT_S):
        check_resolved(directory, shape)
    with reading(f"the tokenizer in {directory}", TOKENIZER_LIMIT_S):
        chat = build_chat(directory, rollout, vocab)
        beyond = chat.has_ids_from(vocab)
    check_template_effects(chat, rollout, [a.problems[0] for a in asked if a.problems])
    with Progress(console=Screen(), transient=True, disable=total <= SHOWN_ABOVE) as bar:
        advance = partial(bar.advance, bar.add_task("problems", total=total))
        for a in asked:
            own = chat if a.suite is None else chat.with_system_prompt(a.suite.system_prompt)
            _check(own, a, longest, vocab if beyond else None, advance)
    remember(digest)


def check_template_effects(chat: "Chat", rollout: RolloutSettings, examples: Sequence[Problem]) -> None:
    """Raises ConfigError for an argument of the chat template without which, and with another value of which, each
    conversation is the same: a misspelt name, or `off` for false."""
    long = [Message(role=r, content="What?") for r in ("user", "assistant", "user")]

    def rendered(arguments: Mapping[str, Any]) -> list[str]:
        texts = [chat.prompt_text(p.messages, p.tools, arguments) for p in examples]
        # a template may take single turns alone
        with suppress(UserError):
            texts.append(chat.prompt_text(long, [], arguments))
        return texts

    given = rollout.chat_template_kwargs
    for name, value in given.items():
        with reading(f"rollout.chat_template_kwargs.{name}", TEMPLATE_LIMIT_S):
            rest = {key: other for key, other in given.items() if key != name}
            with_it, without = rendered(given), rendered(rest)
            if with_it == without and not _is_a_default(name, value, rest, without, rendered):
                raise ConfigError(
                    f"rollout.chat_template_kwargs.{name} is {quoted(value)}, which changes nothing in the rendered "
                    "conversation: correct its name, or write true or false for a switch, or remove it."
                )


def _is_a_default(
    name: str,
    value: Any,
    rest: Mapping[str, Any],
    without: list[str],
    rendered: Callable[[Mapping[str, Any]], list[str]],
) -> bool:
    """Whether another value of an argument would change something."""
    match value:
        case bool():
            other = not value
        case int() | float():
            other = value + 1
        case str():
            other = f"{value}x"
        case _:
            return False
    try:
        return rendered({**rest, name: other}) != without
    # it looks at the value
    except UserError:
        return True


def _check(
    chat: "Chat", asked: Asked, longest: int, vocab: int | None, advance: Callable[[int], None]
) -> None:
    """`vocab` is None where the tokenizer has no id beyond it."""
    too_long: list[tuple[int, str]] = []
    seen: dict[bytes, Problem] = {}
    for start in range(0, len(asked.problems), AT_ONCE):
        problems = asked.problems[start : start + AT_ONCE]
        with reading(f"the chat template of {chat.name}, with the problems of {asked.key}", TEMPLATE_LIMIT_S):
            texts = [_text(chat, problem, asked.key) for problem in problems]
        if start < COMPARED:
            _check_different(chat, problems, texts, seen)
        # a token stands for one byte at least
        looked_at = [
            k for k, text in enumerate(texts) if vocab is not None or len(text.encode()) + _MARGIN >= longest
        ]
        with reading(f"the tokenizer in {chat.name}, with the problems of {asked.key}"):
            ids = chat.encode([texts[k] for k in looked_at])
        for k, prompt in zip(looked_at, ids, strict=True):
            _check_ids(prompt, vocab, f"the prompt of problem {problems[k].id}", chat)
            if len(prompt) >= longest:
                too_long.append((len(prompt), problems[k].id))
        if vocab is not None:
            for problem, answer in zip(problems, chat.encode([p.answer for p in problems]), strict=True):
                _check_ids(answer, vocab, f"the answer of problem {problem.id}", chat)
        advance(len(problems))
    if too_long:
        length, name = max(too_long)
        raise UserError(
            f"{len(too_long)} of {len(asked.problems)} problems leave no room for a response in "
            f"model.max_context_length={longest}: the longest prompt, of {name}, has {length} tokens; raise "
            "model.max_context_length, or leave these problems out."
        )
    for problem in asked.exact:
        _check_answer_fits(chat, problem, longest)


def _text(chat: "Chat", problem: Problem, key: str) -> str:
    try:
        return chat.prompt_text(problem.messages, problem.tools)
    except UserError as error:
        raise UserError(f"problem {problem.id} of {key}: {error}") from None


def _check_different(
    chat: "Chat", problems: Sequence[Problem], texts: Sequence[str], seen: dict[bytes, Problem]
) -> None:
    for problem, text in zip(problems, texts, strict=True):
        first = seen.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), problem)
        if first is not problem and _said(first) != _said(problem):
            raise UserError(
                f"The chat template in {chat.name} renders the problems {first.id} and {problem.id} alike, though "
                "they differ: it leaves out what they say; take the template that belongs to the model."
            )


def _said(problem: Problem) -> str:
    """What a problem says, but for white space, which templates strip."""
    turns = [{**message, "content": " ".join(message["content"].split())} for message in problem.messages]
    return json.dumps([turns, problem.tools], sort_keys=True)


def _check_ids(ids: Sequence[int], vocab: int | None, what: str, chat: "Chat") -> None:
    if vocab is not None and ids and max(ids) >= vocab:
        beyond = max(ids)
        raise UserError(
            f"{what} has the token {chat.decode_all([beyond])!r}, whose id {beyond} is not among the model's {vocab} "
            "(vocab_size in config.json): leave that text out, or take the tokenizer that belongs to the model."
        )


def _check_answer_fits(chat: "Chat", problem: Problem, longest: int) -> None:
    length = len(chat.prompt_ids(problem.messages, problem.tools)) + len(chat.answer_ids(problem.answer))
    if length > longest:
        raise UserError(
            f"Problem {problem.id} and its canonical answer have {length} tokens, more than "
            f"model.max_context_length={longest}; raise that, or leave the problem out."
        )
