"""Tables and plots of measurements, from saved rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engines, figures, gpu_readme, measurements
from benchmarks import plan as plan_sweep
from mst_fx.bench.questions import Question, load_rows, save_rows
from mst_fx.bench.tables import markdown, plot, summary, table
from mst_fx.cli import main


def test_the_table_of_what_was_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_readme, "RESULTS", tmp_path)
    assert gpu_readme.models() == []
    card = "NVIDIA H100 80GB HBM3"
    for work, base in gpu_readme.BASE.items():
        rows = [
            {"system": base, "device": card, "step_s": 0.1, "steps_s": [0.1, 0.1], "peak_bytes": 2**31},
            {"system": "mst", "device": card, "step_s": 0.2, "steps_s": [0.2, 0.2], "peak_bytes": 2**30},
            {"system": "liger", "reason": "not installed"},
        ]
        (tmp_path / f"gpu-{work}.json").write_text(json.dumps({"rows": rows}))
    assert gpu_readme.works()[1:3] == [
        ("head", "mst", "H100", "200", "2.00", "1.07", "0.50"), ("head", "liger", "H100", "not installed", "", "", "")
    ]  # fmt: skip
    (tmp_path / "gpu-longest.json").write_text(
        json.dumps({"rows": [{"system": "mst", "seq_len": 8, "reason": "out of memory"}]})
    )
    assert gpu_readme.models() == [("model, S 8", "mst", "not known", "out of memory", "", "", "")]


def row(system: str, **values: Any) -> dict[str, Any]:
    shapes = values.pop("shapes", {})
    good = {"first_s": 2.0, "step_s": 1.0, "steps_s": [1.0], "peak_bytes": 2**20, "tokens_per_s": 10.0}
    values = values if "reason" in values else {**good, **values}
    named = {"work": "llama", "system": system, "shapes": shapes, "options": {}, "dtype": "float32"}
    return {**named, "device": "a CPU", "versions": {"torch": "2"}, "caches": "cold", **values}


def test_tables_and_plots_come_from_saved_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("inductor"), row("mst", step_s=3.0), row("mst", step_s=0.5), row("liger", reason="needs a GPU")]
    path = tmp_path / "rows.json"
    save_rows(path, Question("head", "cpu", "float32"), rows)
    question, found = load_rows(path)
    assert (question, found) == (Question("head", "cpu", "float32"), rows)
    header, lines = table(question, found)
    assert lines[1][:3] == ("mst", "1.750", "1.75")
    assert lines[2][:2] == ("liger", "needs a GPU")
    assert markdown(header, lines).count("\n") == 4
    assert main(["bench", "head", "--rows", str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    assert "needs a GPU" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["bench", "mlp", "--rows", str(path)]) == 2


@pytest.mark.parametrize("timed", [(), (1024,)])
def test_the_picture_of_lengths_comes_from_saved_rows(
    timed: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "RESULTS", tmp_path)
    for n in (1024, 4096):
        rows = {s: [row(s, peak_bytes=n * 1000 * i)] for i, s in enumerate(measurements.SERIES, 1)}
        measurements.save(f"length-{n}", rows)
    for n in timed:
        measurements.save(f"length-{n}-time", {"clock": "cpu", "cpu_s": {s: [1.0, 2.0] for s in measurements.SERIES}})
    assert figures.draw_lengths(tmp_path / "length.png") == [1024, 4096]
    assert (tmp_path / "length.png").read_bytes()[:4] == b"\x89PNG"


def test_chosen_chunk_sizes_are_shown_beside_the_fastest() -> None:
    times = {"plain": [1.0, 2.0], "128": [0.8, 1.6], "256": [1.2, 2.4]}
    measured = {"cpu_s": times, "peak_bytes": {"plain": 100, "128": 20, "256": 30}}
    found = plan_sweep.lines({"chosen": {**measured, "chosen": 256}, "short": {**measured, "chosen": None}})
    assert found == [
        ("chosen", "256", "1.20", "0.30", "128", "0.80", "1.50"),
        ("short", "left alone", "1.00", "1.00", "128", "0.80", "1.25"),
    ]


def test_lengths_and_compile_tables(tmp_path: Path) -> None:
    rows = [row("mst", shapes={"seq_len": n}, peak_bytes=n * 1000) for n in (1024, 2048)]
    _, lines = table(Question("length", "cpu", "float32"), rows)
    assert lines[1] == ("mst", "2048", "2", "1000", "1.00")
    plot(Question("length", "cpu", "float32"), rows, tmp_path / "length.png")
    rows = [row(s, caches=c, first_s=t) for s, t in (("inductor", 4.0), ("mst", 2.0)) for c in ("cold", "warm")]
    _, lines = table(Question("compile", "cpu", "float32"), rows)
    assert lines[1] == ("mst", "2.0", "0.50", "2.0", "0.50")
    for r in rows:
        del r["peak_bytes"]
    plot(Question("compile", "cpu", "float32"), rows, tmp_path / "compile.png")
    assert "a CPU" in summary(Question("compile", "cpu", "float32"), rows)


def test_the_table_of_engines() -> None:
    """Every engine is in it, in the README as it is saved, and gathers weights as often as without mst."""
    saved = measurements.load("engines")
    assert saved is not None
    lines = [dict(zip(engines.HEADER, line, strict=True)) for line in engines.lines(saved)]
    assert [line["engine"] for line in lines] == list(engines.ENGINES)
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text()
    for line in lines:
        assert f"| {' | '.join(line.values())} |" in readme
        for column in ("all-gathers", "collectives"):
            assert len(set(line[column].split(" -> "))) == 1, line
