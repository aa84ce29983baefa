"""The sets that arXiv 2601.20802 trains on without feedback, in its authors' splits."""

from sdpo_megatron.data.sets.base import DataSet, Origin

_ORIGIN = Origin("github", "lasgroup/SDPO", "0e6d5106abe69f578c63bf38a9394e22905c8773")


def _sciknoweval(domain: str, train: int, test: int, note: str = "") -> DataSet:
    folder = f"datasets/sciknoweval/{domain}"
    return DataSet(
        what=f"SciKnowEval, {domain}: questions with lettered options",
        env="multiple_choice",
        origin=_ORIGIN,
        files={"train": (f"{folder}/train.json",), "test": (f"{folder}/test.json",)},
        licence="Apache-2.0 is the repository's; SciKnowEval's own carries no licence file",
        row=lambda line: line.values | {"domain": domain},
        split="the published files, 90 to 10",
        rows={"train": train, "test": test},
        note=note,
    )


SETS = {
    "sciknoweval-biology": _sciknoweval("biology", 450, 50),
    "sciknoweval-chemistry": _sciknoweval("chemistry", 1890, 210),
    "sciknoweval-material": _sciknoweval(
        "material", 841, 94, note="as published, one question is in both files"
    ),
    "sciknoweval-physics": _sciknoweval("physics", 720, 80),
    "tooluse": DataSet(
        what="ToolUse (ToolAlpaca): requests to be answered by calls of tools",
        env="tool_call",
        origin=_ORIGIN,
        files={"train": ("datasets/tooluse/train.json",), "test": ("datasets/tooluse/test.json",)},
        licence="Apache-2.0 is the repository's; ToolAlpaca's own is not known",
        split="the published files",
        rows={"test": 68},
    ),
}
