"""All pages of a run, and which of them have to be written."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdpo_megatron.envs import environment_class
from sdpo_megatron.errors import ReportedError, UserError
from sdpo_megatron.evaluation.ruler import differences
from sdpo_megatron.evaluation.summary import summary_lines
from sdpo_megatron.files import write_atomically
from sdpo_megatron.report.charts import charts, columns, warnings
from sdpo_megatron.report.responses import own_render
from sdpo_megatron.report.scripts import page, write_script
from sdpo_megatron.report.step_pages import StepFacts, Task, read_facts, write_step
from sdpo_megatron.report.token_texts import TokenTexts, load_token_texts
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.evaluations_file import Evaluation, read_evaluations
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.run_dir.phases import read_ending
from sdpo_megatron.strict_yaml.load import flatten


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the report of the run directory `run`, by default into it, and returns its index.html. Steps whose pages
    are there already are passed over; what of the run is missing or damaged is said in the page.

    Raises UserError where `run` is no run directory, or `out` cannot be written."""
    directory = RunDirectory(run)
    check_is_run(directory)
    out = out or directory.report
    try:
        out.mkdir(parents=True, exist_ok=True)
        site = _Site(directory, out)
        site.write_summary(site.write_steps())
        index = out / "index.html"
        write_atomically(index, page(), durable=False)
    except OSError as error:
        raise UserError(
            f"The report {out} cannot be written: {error.strerror or error}; name another folder with --out."
        ) from None
    return index


class _Site:
    def __init__(self, directory: RunDirectory, out: Path) -> None:
        self.directory, self.out = directory, out
        self.notes: list[str] = []
        self.values: dict[str, Any] = {}
        """The run's settings; none where config.json is missing or damaged."""
        try:
            values = json.loads(directory.config.read_text(encoding="utf-8"))["values"]
            # what is no table may have the form of one
            self.values = {} | values
        except FileNotFoundError:
            self.notes.append("config.json is missing: the settings are not known.")
        except (ValueError, KeyError, TypeError):
            self.notes.append("config.json is damaged: the settings are not known.")

    def write_steps(self) -> dict[str, StepFacts]:
        """Writes the pages that are missing or of files that changed; returns what is known of each step, by
        name."""
        records = dict(_records(self.directory))
        known = {name: read_facts(self.out / name, record) for name, record in records.items()}
        wanting = any(facts is None or facts["lacks_texts"] for facts in known.values())
        texts = self._texts() if wanting else None
        render = self._render()
        found: dict[str, StepFacts] = {}
        for name, facts in known.items():
            if facts is None or (texts is not None and facts["lacks_texts"]):
                task = Task(
                    threshold=self._setting("reprompt", "success_reward_threshold", 0.5),
                    group_size=self._setting("rollout", "group_size") if name.startswith("train/") else None,
                    render=render,
                    texts=texts,
                )
                facts = write_step(records[name], self.out, name, task)
            found[name] = facts
            if facts["error"] is not None:
                self.notes.append(facts["error"])
        return found

    def _texts(self) -> TokenTexts | None:
        try:
            return load_token_texts(self.values, self.directory.snapshots)
        # no settings, no such model here, or whatever its tokenizer's files make transformers raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, KeyError):
                reason = "the settings do not name the model"
            self.notes.append(f"Responses are shown without the colours of their tokens: {reason}.")
            return None

    def _render(self) -> Any:
        name = self._setting("task", "env")
        try:
            return own_render(environment_class(name)) if name else None
        except ReportedError as error:
            self.notes.append(f"Responses are shown as plain text: {error.message}")
            return None

    def write_summary(self, facts: dict[str, StepFacts]) -> None:
        rows = self._rows()
        numbers = columns(rows)
        splits: dict[str, list[Any]] = {}
        problems: dict[str, list[Any]] = {}
        for name, of in facts.items():
            split, _, step = name.rpartition("/")
            splits.setdefault(split, []).append([int(step), of["counts"], of["error"]])
            for group, (problem, right) in enumerate(of["groups"]):
                problems.setdefault(f"{split} {problem}", []).append([split, int(step), group, right])
        summary = {
            "run": str(self.directory.path.resolve()),
            "name": self._setting("run", "name") or self.directory.path.resolve().name,
            "written": time.strftime("%Y-%m-%d %H:%M:%S"),
            "state": self._state(rows),
            "evaluations": self._evaluations(),
            "notes": list(dict.fromkeys(self.notes)),
            "settings": [[key, value] for key, value in flatten(self.values)],
            "steps": [row["step"] for row in rows],
            "columns": numbers,
            "charts": charts(list(numbers)),
            "warnings": warnings(rows),
            "splits": splits,
        }
        write_script(self.out, "summary", summary)
        write_atomically(self.out / "report.json", json.dumps(summary) + "\n", durable=False)
        # pairs: a problem may be called __proto__, which an object's literal takes for its prototype
        write_script(self.out, "problems", list(problems.items()))

    def _rows(self) -> list[dict[str, Any]]:
        try:
            rows = read_rows(self.directory.metrics)
        except UserError as error:
            self.notes.append(error.message)
            return []
        if not self.directory.metrics.is_file() and not self.directory.evaluations.is_file():
            self.notes.append("metrics.jsonl is missing: no step has ended yet, or it was removed.")
        return rows

    def _evaluations(self) -> list[Any]:
        """Each suite's latest evaluation, and what it was measured with; a note says where that changed."""
        latest: dict[str, Evaluation] = {}
        try:
            file = self.directory.evaluations
            evaluations = read_evaluations(file) if file.is_file() else []
        except UserError as error:
            self.notes.append(error.message)
            return []
        for one in evaluations:
            before = latest.get(one.suite, one)
            if changed := differences(before.ruler, one.ruler):
                self.notes.append(
                    f"The numbers of {one.suite} at step {one.step} do not compare with those before, in "
                    f"{'; '.join(changed)}."
                )
            latest[one.suite] = one
        return [
            [suite, one.subject.get("name", ""), list(summary_lines(one)), list(one.ruler.items())]
            for suite, one in latest.items()
        ]

    def _state(self, rows: list[dict[str, Any]]) -> str:
        if not rows and self.directory.evaluations.is_file():
            return "evaluated without training"
        steps = self._setting("run", "steps")
        if steps is not None and rows and rows[-1]["step"] >= steps:
            return f"complete: {steps} steps"
        trained = sum("time/learn" in row or "loss" in row for row in rows)
        try:
            said = [
                ending["message"]
                for path in sorted(self.directory.endings.glob("*.json"))
                if (ending := read_ending(path))
            ]
        except (ValueError, KeyError, TypeError):
            said = []
        of = "" if steps is None else f" of {steps}"
        return f"{trained}{of} steps" + (f"; it ended: {said[0]}" if said else "; it runs, or was ended")

    def _setting(self, section: str, key: str, default: Any = None) -> Any:
        """A setting of a config.json that may be another revision's."""
        part = self.values.get(section)
        return part.get(key, default) if isinstance(part, dict) else default


def check_is_run(directory: RunDirectory) -> None:
    """Raises UserError where nothing of a run lies in the directory."""
    path = directory.path
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; name a run directory, such as runs/demo_cpu.")
    parts = (directory.config, directory.metrics, directory.rollouts("train", 0).parent.parent)
    if not any(part.exists() for part in parts):
        raise UserError(
            f"{path} is no run directory: it has no config.json, no metrics.jsonl and no rollouts/; name one, such as "
            "runs/demo_cpu."
        )


def _records(directory: RunDirectory) -> Iterator[tuple[str, Path]]:
    """Yields name and path of each step's records, training first."""
    rollouts = directory.rollouts("train", 0).parent.parent
    folders = [path for path in rollouts.iterdir() if path.is_dir()] if rollouts.is_dir() else []
    folders.sort(key=lambda path: (path.name != "train", path.name))
    for folder in folders:
        for record in sorted(folder.glob("*.jsonl")):
            if record.stem.isdecimal():
                yield f"{folder.name}/{record.stem}", record
