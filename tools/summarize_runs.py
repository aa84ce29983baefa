"""The accuracy of runs side by side: by step, by hour of training, by generated token, and the best within a budget.

    python tools/summarize_runs.py runs/sdpo runs/grpo --plot curves.svg

Reads the files of the runs alone, of those that crashed or still go on too. Runs whose numbers were not measured alike
are refused with what differs. A directory of `python -m sdpo_megatron.evaluate` is shown in a table of its own.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sdpo_megatron.errors import UserError
from sdpo_megatron.evaluation.curves import ACCURACY, Curve, Point, read_curve
from sdpo_megatron.evaluation.ruler import check_same_ruler
from sdpo_megatron.files import output_file
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.evaluations_file import HELD_OUT, Evaluation, read_evaluations

COLUMNS = 6
"""Of a table by hours or tokens."""


def main() -> int:
    options = parse()
    try:
        print(summary(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--suite", default=HELD_OUT, help="the name under eval.suites (default: %(default)s)")
    parser.add_argument(
        "--measure", default=ACCURACY, help="a metric, or how its name begins (default: %(default)s)"
    )
    parser.add_argument(
        *("--budget",),
        type=float,
        nargs="+",
        default=[1.0, 5.0],
        metavar="HOURS",
        help="of training, within which the best is looked for (default: 1 5)",
    )
    parser.add_argument(
        "--plot", type=output_file, metavar="FILE", help="an .svg or .png to draw the curves into"
    )
    parser.add_argument("--anyway", action="store_true", help="show runs of unlike rulers too, marked with *")
    return parser.parse_args()


def summary(options: argparse.Namespace) -> str:
    """Returns Markdown. Raises UserError for what is no run, and for unlike rulers."""
    paths: dict[str, Path] = {}
    for path in options.runs:
        if paths.setdefault(_label(path), path) != path:
            raise UserError(f"{paths[_label(path)]} and {path} have one name; rename one of the directories.")
    alone = {name: path for name, path in paths.items() if _is_alone(path)}
    curves = {name: read_curve(path, options.suite) for name, path in paths.items() if name not in alone}
    latest = {name: _latest(path, options.suite) for name, path in alone.items()}
    rulers = {name: (curves[name] if name in curves else latest[name]).ruler for name in paths}
    unlike = check_same_ruler(rulers, options.anyway)
    if unlike:
        curves = {_marked(name, unlike): curve for name, curve in curves.items()}
        latest = {_marked(name, unlike): evaluation for name, evaluation in latest.items()}
    parts = tables(curves, options.suite, options.measure, options.budget) if curves else []
    if latest:
        parts.append(table_of_alone(latest))
    if options.plot:
        if not curves:
            raise UserError("--plot needs runs: evaluations without training have no curve.")
        plot(curves, f"{options.suite} {_name_of(curves, options.measure)}", options.measure, options.plot)
    return "\n\n".join([*parts, *(f"\\* {name}: {difference}." for name, difference in unlike.items())])


def _label(path: Path) -> str:
    """The run's name, and what it learns by, as far as its config.json says."""
    name = path.resolve().name
    try:
        loss = json.loads(RunDirectory(path).config.read_text(encoding="utf-8"))["values"]["loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return name
    if _is_alone(path):
        return name
    blend = loss.get("group_advantage_weight") or 0.0
    what = "GRPO" if loss["name"] == "grpo" else f"SDPO, {loss['name']}"
    return f"{name} ({what}{f', {blend:g} GRPO' if blend else ''})"


def _is_alone(path: Path) -> bool:
    directory = RunDirectory(path)
    return directory.evaluations.is_file() and not directory.metrics.is_file()


def _latest(path: Path, suite: str) -> Evaluation:
    found = [one for one in read_evaluations(RunDirectory(path).evaluations) if one.suite == suite]
    if not found:
        raise UserError(f"{path} has no evaluation of the suite '{suite}'.")
    return found[-1]


def _marked(name: str, unlike: Mapping[str, str]) -> str:
    return f"{name} \\*" if name in unlike else name


def tables(curves: Mapping[str, Curve], suite: str, measure: str, budgets: Sequence[float]) -> list[str]:
    """Returns the tables of runs: a row for each. Between two evaluations a value lies on the line between theirs."""
    what = f"{suite} {_name_of(curves, measure)}"
    steps = sorted({point.step for curve in curves.values() for point in curve.points})
    if not any(point.value(measure) is not None for curve in curves.values() for point in curve.points):
        names = sorted({name for curve in curves.values() for p in curve.points for name in p.metrics})
        raise UserError(f"no run has a metric that begins with '{measure}'; there are: {', '.join(names)}.")

    def at_step(curve: Curve, step: int) -> str:
        return _shown(next((point.value(measure) for point in curve.points if point.step == step), None))

    def best(curve: Curve, hours: float) -> str:
        within = [
            (value, p) for p in curve.points if (value := p.value(measure)) is not None and p.hours <= hours
        ]
        if not within:
            return ""
        value, point = max(within, key=lambda pair: pair[0])
        reached = max(p.hours for p in curve.points)
        unfinished = f"; {reached:.2g} h so far" if reached < hours else ""
        return f"{value:.3f} (step {point.step}{unfinished})"

    by_hours = _grid(curves, lambda point: point.hours)
    by_tokens = _grid(curves, lambda point: point.tokens)
    return [
        _table(f"{what}, by step", [str(step) for step in steps], curves, lambda c, k: at_step(c, steps[k])),
        _table(
            *(f"{what}, by hour of training", [f"{hours:.2g}" for hours in by_hours], curves),
            lambda c, k: _between(c, measure, by_hours[k], lambda point: point.hours),
        ),
        _table(
            *(f"{what}, by generated token", [f"{tokens:,.0f}" for tokens in by_tokens], curves),
            lambda c, k: _between(c, measure, by_tokens[k], lambda point: point.tokens),
        ),
        _table(
            f"{what}, best within", [f"{h:g} h" for h in budgets], curves, lambda c, k: best(c, budgets[k])
        ),
    ]


def _name_of(curves: Mapping[str, Curve], measure: str) -> str:
    """The whole name of the metric."""
    points = [point for curve in curves.values() for point in curve.points]
    return next((name for point in points if (name := point.name(measure))), measure)


def _grid(curves: Mapping[str, Curve], place: Callable[[Point], float]) -> list[float]:
    longest = max(place(point) for curve in curves.values() for point in curve.points)
    ends = {max(map(place, curve.points)) for curve in curves.values() if curve.points}
    # where a run ends its last value stands
    return sorted({longest * k / COLUMNS for k in range(1, COLUMNS)} | ends)


def _between(curve: Curve, measure: str, at: float, place: Callable[[Point], float]) -> str:
    """The value on the line between the evaluations before and after; nothing after the last one."""
    known = [(place(point), value) for point in curve.points if (value := point.value(measure)) is not None]
    if not known or at > known[-1][0] * (1 + 1e-9):
        return ""
    return _shown(float(np.interp(at, [x for x, _ in known], [y for _, y in known])))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(
    title: str, columns: Sequence[str], curves: Mapping[str, Curve], cell: Callable[[Curve, int], str]
) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(cell(curve, k) for k in range(len(columns)))} |"
        for name, curve in curves.items()
    ]
    return "\n".join(lines)


def table_of_alone(latest: Mapping[str, Evaluation]) -> str:
    """Returns the table of evaluations without training: a row for each, with the interval of its accuracy."""
    names = list(
        dict.fromkeys(key for one in latest.values() for key in one.metrics if "@" in key and "/" not in key)
    )
    lines = [f"| evaluated alone | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, one in latest.items():
        cells = []
        for key in names:
            value, low, high = (one.metrics.get(f"{key}{end}") for end in ("", "/low", "/high"))
            cells.append(
                _shown(value) + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(curves: Mapping[str, Curve], what: str, measure: str, path: Path) -> None:
    """Draws the curves by step and by hour. Raises UserError where matplotlib cannot write such a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, label, place in (
        (axes[0], "training steps", lambda point: point.step),
        (axes[1], "hours of training", lambda point: point.hours),
    ):
        for name, curve in curves.items():
            known = [point for point in curve.points if point.value(measure) is not None]
            axis.plot([place(p) for p in known], [p.value(measure) for p in known], marker="o", label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(what)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}; name a .svg or .png file.") from None


if __name__ == "__main__":
    sys.exit(main())
