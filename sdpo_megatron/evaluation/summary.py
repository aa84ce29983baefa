"""An evaluation in a few lines for a terminal."""

from collections.abc import Iterator

from sdpo_megatron.run_dir.evaluations_file import Evaluation

NOT_SHOWN = ("env/all/reward/total", "env/all/correct", "env/all/response_length/max")
SHOWN_IF_ANY = ("env/all/unfinished_thought_fraction", "env/all/ungraded_fraction")
AS_NUMBERS = ("response_length", "doubt_words")
WORDS = {
    "env/all/format_fraction": "right form",
    "env/all/truncated_fraction": "cut off",
    "env/all/unfinished_thought_fraction": "thought not finished",
    "env/all/ungraded_fraction": "not graded",
    "env/all/response_length/mean": "tokens",
    "env/all/doubt_words": "words of doubt",
    "exact_answer_prob": "exact",
}


def summary_lines(evaluation: Evaluation) -> Iterator[str]:
    """Yields a line with the accuracies and their interval, one with the rest, and one for each domain and
    difficulty."""
    metrics = evaluation.metrics
    accuracies = {key: value for key, value in metrics.items() if "@" in key and "/" not in key}
    shown = [f"{key} {value:.1%}" for key, value in accuracies.items()]
    if shown:
        name = next(iter(accuracies))
        shown[0] += f" [{metrics[f'{name}/low']:.1%}, {metrics[f'{name}/high']:.1%}]"
    problems = evaluation.ruler["problems"].partition(",")[0]
    yield f"{evaluation.suite} ({problems}): {', '.join(shown) or 'nothing graded'}"
    others = {
        key: value
        for key, value in metrics.items()
        if key not in NOT_SHOWN and "@" not in key and (value or key not in SHOWN_IF_ANY)
    }
    if others:
        yield "  " + ", ".join(_written(key, value) for key, value in others.items())
    for key, value in metrics.items():
        part, _, rest = key.partition("/")
        if part in ("domain", "difficulty"):
            yield f"  {part} {rest.rpartition('/')[0]}: {value:.1%}"


def _written(key: str, value: float) -> str:
    name = WORDS.get(key, key.removeprefix("env/all/"))
    return f"{name} {value:.1f}" if any(word in key for word in AS_NUMBERS) else f"{name} {value:.1%}"
