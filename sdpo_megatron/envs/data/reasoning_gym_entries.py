"""A script: makes entries of a reasoning-gym data set in a process of its own, which has a fixed hash seed.

Some generators walk through sets of texts, whose order Python changes from one process to the next: a run that goes on
would be asked other problems. It reads {"dataset", "config", "seed", "size"} as JSON from standard input, and pickles
into the file that it is given a list of entries, or a text that says why there are none.
"""

import dataclasses
import difflib
import json
import pickle
import sys
from pathlib import Path
from typing import Any


def made(dataset: str, config: dict[str, Any], seed: int, size: int) -> list[dict[str, Any]] | str:
    """Returns entries with `question`, `answer` (text or None) and `metadata`, or what the user has to mend."""
    try:
        import reasoning_gym.factory as gym  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        return (
            f"task.env is reasoning_gym, but its package cannot be imported ({error}); run: pip install "
            "reasoning-gym==0.1.25 (one of its requirements needs a C compiler and Python's headers)."
        )
    if dataset not in gym.DATASETS:
        near = difflib.get_close_matches(dataset, gym.DATASETS, n=3, cutoff=0.4)
        meant = f" The nearest are: {', '.join(near)}." if near else ""
        many = len(gym.DATASETS)
        return f"reasoning-gym has no generator (task.options.dataset) '{dataset}' among its {many}.{meant}"
    known = [field.name for field in dataclasses.fields(gym.DATASETS[dataset][1])]
    known = sorted(set(known) - {"seed", "size"})
    for key in config:
        if key not in known:
            return (
                f"{dataset} has no setting (task.options.config) '{key}'. There are: {', '.join(known)}; seed and "
                "sizes are task.options' own."
            )
    try:
        data = gym.create_dataset(dataset, **config, seed=seed, size=size)
    # it checks by assertions, and what it does not check fails in its own ways
    except Exception as error:
        return f"{dataset} refuses task.options.config: {error}."
    return [dict(data[index]) for index in range(size)]


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(pickle.dumps(made(**json.load(sys.stdin))))
