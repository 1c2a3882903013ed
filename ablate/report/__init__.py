"""Run folders in, frames, statistics, verdicts and one page out. Imports no torch, but for plan.py
and estimate.py, which look ahead (what a study would take and could decide), and imported.py.

frames.py     run folders as pandas frames
stats.py      arms, seeds and curves: intervals, tests, what could have been seen
confounds.py  what differs between arms besides the factors
verdicts.py   the sentences that the statistics allow
plots.py      figures in one style
page.py       the page, its tables and files
export.py     a study as a folder of frames that can be committed
imported.py   run folders again from such a folder, to go on with the study
"""

from __future__ import annotations

from ablate.report.frames import load_metrics, load_study
from ablate.report.verdicts import analyse, verdicts

__all__ = ["analyse", "load_metrics", "load_study", "verdicts"]
