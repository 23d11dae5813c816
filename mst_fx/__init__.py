"""Train language models on longer sequences: ``torch.compile(model, backend="mst")``.

Importing this package is not needed for that. It offers ``explain`` and ``reports``, which say what the
backend did and why, and ``minisequence``, which turns checkpointing on and compiles in one call.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mst_fx.report import RegionReport as RegionReport
from mst_fx.report import Report as Report

if TYPE_CHECKING:
    from mst_fx.dry_run import explain as explain
    from mst_fx.promise import tokenwise as tokenwise
    from mst_fx.recipe import minisequence as minisequence

__version__ = version("mst_fx")
__all__ = ["RegionReport", "Report", "__version__", "explain", "minisequence", "reports", "tokenwise"]


def reports() -> list[Report]:
    """Return the reports of what the backend compiled in this process, oldest first."""
    from mst_fx.backend import reports as found

    return found()


def __getattr__(name: str) -> Any:
    if name == "explain":
        from mst_fx.dry_run import explain

        return explain
    if name == "minisequence":
        from mst_fx.recipe import minisequence

        return minisequence
    if name == "tokenwise":
        from mst_fx.promise import tokenwise

        return tokenwise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
