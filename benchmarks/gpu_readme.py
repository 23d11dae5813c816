"""Writes the table of benchmarks/README.md of what was measured on a GPU from the rows that ``benchmarks.gpu`` saved.

python -m benchmarks.gpu_readme
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.figures import replace_table
from benchmarks.gpu import RESULTS
from mst_fx.bench.turns import median_ratio

BASE = {"head": "inductor", "mlp": "inductor+checkpoint"}
"""What a system's time and peak are divided by."""
CELLS = ("work", "system", "card", "ms a step", "by", "peak GB", "by")


def main() -> None:
    """Replace the table."""
    replace_table("gpu", [_line(CELLS), _line("---" for _ in CELLS), *map(_line, [*works(), *models()])])


def works() -> list[tuple[str, ...]]:
    """Return the cells of head and MLP, every system by the base in the same process: medians over rounds."""
    found = []
    for work, base in BASE.items():
        rows = _load(work)
        first = next(r for r in rows if r["system"] == base)
        for row in rows:
            if "reason" in row:
                found.append((work, row["system"], _card(rows), row["reason"], "", "", ""))
                continue
            found.append((
                work, row["system"], _card(rows), f"{1e3 * row['step_s']:.0f}",
                f"{median_ratio(row['steps_s'], first['steps_s']):.2f}",
                f"{row['peak_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / first['peak_bytes']:.2f}",
            ))  # fmt: skip
    return found


def models() -> list[tuple[str, ...]]:
    """Return the cells of whole models: peaks with the model's own bytes, optimizer states included."""
    found = []
    for rows in (_load("lengths"), _load("longest")):
        for row in rows:
            named = f"model, S {row['seq_len']}", row["system"], _card(rows)
            if "reason" in row:
                found.append((*named, row["reason"], "", "", ""))
                continue
            told = f"{1e3 * row['step_s']:.0f}" + ("" if row["steps_s"] else ", compiling")
            found.append((*named, told, "", f"{row['peak_gb']:.1f}", ""))
    return found


def _card(rows: list[dict[str, Any]]) -> str:
    """Return the card that rows were measured on; a row that has only a reason does not say it."""
    device = next((r["device"] for r in rows if "device" in r), None)
    return "not known" if device is None else device.removeprefix("NVIDIA ").split(" ")[0]


def _load(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"gpu-{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
