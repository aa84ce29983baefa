"""The report of a run: pages that a browser opens from `file://`, made from what lies in the run directory.

    RUN/report/index.html                what is opened: page, style and scripts in one file
    RUN/report/summary.js                the trends, the settings and the list of steps
    RUN/report/report.json               the same numbers as plain JSON
    RUN/report/problems.js               where each problem was asked
    RUN/report/train/000012/step.js      a step's responses, in few numbers each
    RUN/report/train/000012/0000.js ...  their texts and tokens, some groups a file

A browser does not `fetch` from `file://`, but it loads scripts: a page of data is a script that makes one call. It is
loaded when it is looked at. A step that has not changed is not written again.
"""

from sdpo_megatron.report.site import write_report

__all__ = ["write_report"]
