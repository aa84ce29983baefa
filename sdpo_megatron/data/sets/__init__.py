"""The published sets by name. A new one is a few lines in a file here, and a test."""

from sdpo_megatron.data.sets import choices, mathematics, programs, sciknoweval
from sdpo_megatron.data.sets.base import DataSet

SETS: dict[str, DataSet] = sciknoweval.SETS | mathematics.SETS | programs.SETS | choices.SETS
