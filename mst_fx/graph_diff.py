"""Before and after of a report as text."""

from __future__ import annotations

import difflib

from mst_fx.report import Report


def text_diff(report: Report) -> str:
    """Return the summary, the changed lines of the graph and the bodies they call."""
    changed = [
        line
        for line in difflib.unified_diff(
            report.before.splitlines(), report.after.splitlines(), "before", "after", "", "", 1, ""
        )
    ]
    bodies = [f"\nbody {name}:\n{code}" for name, code in report.bodies]
    return "\n".join([str(report), "", *changed, *bodies])
