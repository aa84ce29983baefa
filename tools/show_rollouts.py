"""A run's responses in a terminal: its steps, a step's groups, a group's responses.

    python tools/show_rollouts.py runs/demo_cpu                        the steps
    python tools/show_rollouts.py runs/demo_cpu --step 12              the responses of step 12
    python tools/show_rollouts.py runs/demo_cpu --step 12 --failed     those that were wrong
    python tools/show_rollouts.py runs/demo_cpu --problem 68+12        a problem, at every step that asked it

Tokens are coloured by their advantage, blue where the teacher finds them likelier than the student does, where they
were recorded and the model's tokenizer is here. What would steer the terminal is shown as its escape. `python -m
sdpo_megatron.report` makes pages of the same.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from sdpo_megatron.errors import EXIT_USER_ERROR, ReportedError, UserError
from sdpo_megatron.report.responses import FLAGS, divergence_of, flags_of, token_count
from sdpo_megatron.report.site import check_is_run
from sdpo_megatron.report.token_texts import TokenTexts, load_token_texts
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.records_file import RecordedResponse, read_record
from sdpo_megatron.terminal import Screen, escape_what_cannot_be_shown, tell

CLIP = 2000
"""Characters of a text that are shown without --whole."""
COLOURS = {"right": "green", "wrong": "red", "ungraded": "yellow"}


class Shown(NamedTuple):
    step: int
    number: int
    response: RecordedResponse
    flags: list[str]


def visible(text: str) -> str:
    """Returns the text with what a terminal would obey, or not show, as its escape; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class Viewer:
    def __init__(self, run: Path, split: str, whole: bool) -> None:
        self.directory, self.split, self.whole = RunDirectory(run), split, whole
        check_is_run(self.directory)
        self.screen = Screen()
        try:
            values = json.loads(self.directory.config.read_text(encoding="utf-8"))["values"]
        except (OSError, ValueError, KeyError, TypeError):
            values = {}
        self.values: dict[str, Any] = values
        self.threshold = values.get("reprompt", {}).get("success_reward_threshold", 0.5)

    def steps(self) -> list[int]:
        folder = self.directory.rollouts(self.split, 0).parent
        found = sorted(int(path.stem) for path in folder.glob("*.jsonl") if path.stem.isdecimal())
        if not found:
            raise UserError(
                f"{folder} holds no records: log.rollouts was false, no step has ended, or --split is wrong."
            )
        return found

    def responses(self, step: int) -> Iterator[Shown]:
        """Yields a step's responses. Raises UserError where its record is missing or damaged."""
        for number, response in enumerate(read_record(self.directory.rollouts(self.split, step))):
            bits = flags_of(response, self.threshold)
            flags = [flag for bit, flag in enumerate(FLAGS) if bits >> bit & 1 and flag != "per token"]
            yield Shown(step, number, response, flags)

    def overview(self) -> None:
        table = Table(title=f"{self.directory.path}, {self.split}")
        for column in ("step", "responses", "right", "truncated", "no teacher", "ungraded", "divergence"):
            table.add_column(column, justify="right")
        for step in self.steps():
            try:
                of = list(self.responses(step))
            except UserError as error:
                table.add_row(str(step), Text(visible(error.message)))
                continue
            counts = [
                sum(flag in shown.flags for shown in of)
                for flag in ("right", "truncated", "no teacher", "ungraded")
            ]
            means = [mean for shown in of if (mean := divergence_of(shown.response)) is not None]
            divergence = f"{sum(means) / len(means):.3g}" if means else "-"
            table.add_row(str(step), str(len(of)), *map(str, counts), divergence)
        self.screen.print(table)
        self.screen.print("Add --step N for the responses of a step.", markup=False)

    def show(self, shown: Shown, texts: TokenTexts | None) -> None:
        response, kind = shown.response, shown.flags[0]
        head = Text(f"step {shown.step}  response {shown.number}  ", style="bold")
        head.append(kind, style=COLOURS[kind])
        reward = "-" if response.reward is None else f"{response.reward:g}"
        divergence = divergence_of(response)
        head.append(f"  reward {reward}  {token_count(response)} tokens", style="not bold")
        head.append("" if divergence is None else f"  divergence {divergence:g}", style="not bold")
        head.append("".join(f"  {flag}" for flag in shown.flags[1:]), style="yellow not bold")
        self.screen.print(head)
        self.part("problem", Text(f"{visible(response.problem)}: {self.cut(response.prompt[-1]['content'])}"))
        if response.thought:
            self.part("thought", Text(self.cut(response.thought)))
        self.part("response", self.coloured(response, texts) or Text(self.cut(response.response)))
        for name, text in (
            ("feedback", response.feedback),
            ("ungraded", response.ungraded or ""),
            ("teacher read", response.teacher_prompt or ""),
        ):
            if text:
                self.part(name, Text(self.cut(text)))
        if response.demonstration_id is not None:
            self.part("solution", Text(f"response {response.demonstration_id}"))
        self.screen.print()

    def part(self, name: str, text: Text) -> None:
        lines = text.split("\n", allow_blank=True)
        self.screen.print(Text.assemble((f"{name:>12}  ", "dim"), Text(f"\n{'':14}").join(lines)))

    def cut(self, text: str) -> str:
        if self.whole or len(text) <= CLIP:
            return visible(text)
        return f"{visible(text[:CLIP])} … ({len(text) - CLIP} characters more: --whole)"

    def coloured(self, response: RecordedResponse, texts: TokenTexts | None) -> Text | None:
        advantages = response.advantages_T
        if texts is None or response.response_ids_T is None or advantages is None:
            return None
        shown = Text()
        for text, advantage in zip(
            texts.of(response.response_ids_T.tolist()), advantages.tolist(), strict=True
        ):
            strong = abs(advantage) >= 0.1
            style = ("white on blue" if advantage > 0 else "black on dark_orange") if strong else ""
            shown.append(visible(text), style=style)
            if len(shown) > CLIP and not self.whole:
                shown.append(" … (more: --whole)")
                break
        return shown

    def texts(self) -> TokenTexts | None:
        # a pipe has no colours
        if not self.screen.is_terminal:
            return None
        try:
            return load_token_texts(self.values, self.directory.snapshots)
        # whatever the model's files, or their absence, bring about: the text is there without colours
        except Exception as error:
            self.screen.print(f"No colours: {visible(str(error))}", markup=False, style="dim")
            return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory, such as runs/demo_cpu")
    parser.add_argument("--step", type=int, help="shows the responses of this step")
    parser.add_argument(
        "--split", help="a folder under rollouts/; by default train, or eval where there is none"
    )
    parser.add_argument(
        "--problem", help="shows the responses to this problem alone, of all steps without --step"
    )
    parser.add_argument("--failed", action="store_true", help="leaves out what was right")
    parser.add_argument(
        "--limit", type=int, default=20, help="shows so many responses at most (20); 0 shows all"
    )
    parser.add_argument("--whole", action="store_true", help=f"also shows what lies behind {CLIP} characters")
    arguments = parser.parse_args()
    escape_what_cannot_be_shown()
    try:
        return show(arguments)
    except ReportedError as error:
        tell(f"error: {error}", sys.stderr)
        return EXIT_USER_ERROR


def show(arguments: argparse.Namespace) -> int:
    rollouts = RunDirectory(arguments.run).rollouts("train", 0).parent
    split = arguments.split or (
        "eval" if not rollouts.exists() and (rollouts.parent / "eval").exists() else "train"
    )
    viewer = Viewer(arguments.run, split, arguments.whole)
    if arguments.step is None and arguments.problem is None and not arguments.failed:
        viewer.overview()
        return 0
    steps = viewer.steps() if arguments.step is None else [arguments.step]
    found = (
        shown
        for step in steps
        for shown in viewer.responses(step)
        if (arguments.problem is None or shown.response.problem == arguments.problem)
        and not (arguments.failed and "right" in shown.flags)
    )
    texts = viewer.texts()
    number = 0
    for number, shown in enumerate(found, start=1):
        if arguments.limit and number > arguments.limit:
            viewer.screen.print(f"There are more than {arguments.limit}: --limit 0 shows all.", markup=False)
            return 0
        viewer.show(shown, texts)
    if not number:
        raise UserError("No response is of this kind; leave out --problem or --failed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
