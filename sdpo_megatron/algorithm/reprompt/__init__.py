"""What the teacher reads: the problem plus what the group and the environment found out about it.

The teacher is the same model, shown a sibling's successful response and/or the environment's feedback, and it
scores the student's own tokens under that prompt (SDPO, arXiv 2601.20802 section 2). Which solution and which feedback
is decided in `choice.py`; the words around them are `template.py`'s or the environment's own (`Environment.show`); what
is too long for them is shortened in `fitting.py`.
"""

from sdpo_megatron.algorithm.reprompt.samples import Show, build_samples, reprompt_metrics
from sdpo_megatron.algorithm.reprompt.settings import PRESETS, RepromptSettings, reprompt_warnings
from sdpo_megatron.algorithm.reprompt.template import Template

__all__ = [
    "PRESETS",
    "RepromptSettings",
    "Show",
    "Template",
    "build_samples",
    "reprompt_metrics",
    "reprompt_warnings",
]
