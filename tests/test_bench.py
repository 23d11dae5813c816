"""`mst-fx bench` on tiny shapes: real cells, rows with reasons, tables and plots from saved rows."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mst_fx
from benchmarks import figures, gpu, measurements
from mst_fx.bench import questions, turns
from mst_fx.bench.questions import Question, ask, load_rows, plan, run_cell
from mst_fx.bench.systems import SYSTEMS, UnavailableError
from mst_fx.bench.works import WORKS, Work, head, mlp
from mst_fx.cli import main
from mst_fx.commands.models import UsageError
from mst_fx.measure import MALLOC_ENV, matmul_slowdown
from tests.test_bench_own import TINY_QWEN
from tests.test_bench_tables import row

CPU = {"dtype": torch.float32, "device": "cpu"}
TINY: dict[str, Any] = {
    "head": {"tokens": 40, "hidden": 16, "vocab": 96},
    "mlp": {"tokens": 40, "hidden": 16, "intermediate": 48},
}
COMPILED = (
    "inductor", "inductor+checkpoint", "auto_chunker", "cut-cross-entropy", "mst", "mst parameter", "mst+checkpoint",
    "mst+checkpoint by 2",
)  # fmt: skip


@pytest.mark.parametrize("work", TINY)
@pytest.mark.parametrize("system", [s for s in SYSTEMS if s not in COMPILED])
def test_every_eager_system_does_the_same_work(work: str, system: str) -> None:
    made = WORKS[work](**TINY[work], **CPU)
    try:
        fn = SYSTEMS[system](made, {"chunk_tokens": 16})
    except UnavailableError as e:
        if (work, system) in {("mlp", "F.linear_cross_entropy"), ("head", "chunk checkpoint")}:
            return
        assert system == "liger" or not hasattr(torch.nn.functional, "linear_cross_entropy")
        pytest.skip(str(e))
    made.step(fn)
    found = {n: g.clone() for n, g in made.gradients().items()}
    made.clear()
    made.step(made.module)
    for name, gradient in made.gradients().items():
        torch.testing.assert_close(found[name], gradient)


def test_checkpointing_as_a_system_trains_the_same_weights() -> None:
    made = WORKS["llama"](seq_len=32, layers=1, hidden=32, intermediate=64, vocab=96, heads=2, **CPU)
    for system in ("inductor+checkpoint", "mst+checkpoint", "mst+checkpoint by 2"):
        fn = SYSTEMS[system](made, {})
        assert fn._orig_mod is not made.module
        assert fn._orig_mod.is_gradient_checkpointing
        assert {id(p) for p in fn._orig_mod.parameters()} == {id(p) for p in made.module.parameters()}
    assert not made.module.is_gradient_checkpointing
    with pytest.raises(UnavailableError, match="no layers to checkpoint"):
        SYSTEMS["mst+checkpoint"](head(**TINY["head"], **CPU), {})


def test_a_model_compiled_by_layer_frees_gradients_early() -> None:
    """As the search for the longest sequence compiles it: the same gradients, the last layer's before the first's."""
    sizes = {"seq_len": 64, "layers": 2, "hidden": 32, "intermediate": 96, "vocab": 128, "heads": 2}
    made = WORKS["llama"](**sizes, checkpointing=True, **CPU)
    made.step(made.module)
    wanted = [g.clone() for g in made.gradients().values()]
    made.clear()
    fn = gpu.by_layer(made.module, "mst", {"chunk_tokens": 16, "compiler": "aot_eager"})
    came: list[str] = []
    for name, parameter in made.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))
    made.step(fn)
    for found, gradient in zip(made.gradients().values(), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    layers = [name.split(".")[2] for name in came if ".layers." in name]
    assert layers == sorted(layers, reverse=True)
    assert "lm_head" in came[0]
    kinds = [r.kind for report in mst_fx.reports() for r in report.regions if r.status == "chunked"]
    assert {"mlp", "loss"} <= set(kinds)


def gpu_arguments(*given: str) -> argparse.Namespace:
    return gpu.parser().parse_args(["longest", "--device", "cpu", *given])


def test_the_longest_sequence_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Doubled until memory runs out, then the gap is halved twice; other failures are told and end the search."""
    tried: list[tuple[str, int]] = []

    def trial(args: Any, system: str, length: int, seconds: float) -> dict[str, Any]:
        tried.append((system, length))
        if system == "inductor":
            return {"system": system, "seq_len": length, "reason": "CUDA error: no kernel"}
        if length > 50000:
            return {"system": system, "seq_len": length, "reason": gpu.OUT_OF_MEMORY}
        return {"system": system, "seq_len": length, "step_s": 1.0, "peak_gb": 79.0}

    monkeypatch.setattr(gpu, "_trial_apart", trial)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.longest(gpu_arguments()) == 0
    assert [n for s, n in tried if s == "mst"] == [16384, 32768, 65536, 49152, 57344]
    assert [n for s, n in tried if s == "inductor"] == [16384]
    shown = capsys.readouterr().out
    assert "49152" in shown
    assert "57344" in shown
    assert "no kernel" in shown
    assert len(json.loads((tmp_path / "gpu-longest.json").read_text())["rows"]) == 6


def test_given_lengths_are_measured_by_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trial(args: Any, system: str, length: int, seconds: float) -> dict[str, Any]:
        row = {"system": system, "seq_len": length}
        if length > 5000:
            return {**row, "reason": gpu.OUT_OF_MEMORY}
        return {**row, "step_s": 2.0, "first_s": 9.0, "tokens_per_s": length / 2, "peak_gb": 7.0}

    monkeypatch.setattr(gpu, "_trial_apart", trial)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.longest(gpu_arguments("--lengths", "4096,8192", "--systems", "mst,inductor")) == 1
    rows = json.loads((tmp_path / "gpu-lengths.json").read_text())["rows"]
    assert [(r["system"], r["seq_len"]) for r in rows] == [
        ("mst", 4096), ("inductor", 4096), ("mst", 8192), ("inductor", 8192)
    ]  # fmt: skip
    assert "2048" in capsys.readouterr().out


def test_systems_take_turns_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.MORE_OPTIONS, "head", ({}, {"chunk_tokens": 32}))
    question = Question(
        "head", "cpu", "float32", None, ("eager", "mst", "liger"), {"tokens": 128, "hidden": 16, "vocab": 600},
        {"chunk_tokens": 64, "compiler": "aot_eager"}, steps=2,
    )  # fmt: skip
    rows = gpu.together(question, plan(question))
    names = ["eager", "mst, chunk_tokens 64, compiler aot_eager", "mst, chunk_tokens 32, compiler aot_eager", "liger"]
    assert [r["system"] for r in rows] == names
    assert all(len(r["steps_s"]) == 2 and r["step_s"] > 0 for r in rows[:3])
    assert [r["chunk_tokens"] for r in rows[:3]] == [[], [64], [32]]
    assert "GPU" in rows[3]["reason"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident size of a process on Linux")
def test_what_is_measured_beside_mst_does_without_it() -> None:
    """The backend prepares the C++ compiler when it is imported, which would be a start for plain Inductor too."""
    names = "mst_fx.bench.cell, mst_fx.bench.turns, mst_fx.bench.works, mst_fx.commands.demo"
    script = f"import sys, {names}; sys.exit('mst_fx.backend' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_freed_memory_is_kept_for_times_alone() -> None:
    script = """
import json, torch
from mst_fx.measure import _status, keep_freed_memory
def kept():
    before = _status("VmRSS")
    torch.ones(2**20)
    return _status("VmRSS") - before
torch.ones(2**20)
found = [kept()]
keep_freed_memory()
print(json.dumps([*found, kept()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **MALLOC_ENV}, capture_output=True, text=True, check=True
    )
    given_back, kept = json.loads(done.stdout)
    assert given_back < 2**20
    assert kept > 3 * 2**20


def test_a_system_that_fails_in_its_turn_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(work: Work, options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setitem(SYSTEMS, "liger", failing)
    shapes = [f"--set={k}={v}" for k, v in TINY["mlp"].items()]
    row = turns.run(["mlp", "--systems", "eager,liger,chunk checkpoint", "--steps", "2", "--device", "cpu", *shapes])
    assert row["reasons"] == {"liger": "out of memory"}
    assert {s: len(t) for s, t in row["steps_s"].items()} == {"eager": 2, "chunk checkpoint": 2}
    assert row["ratios"]["eager"] == 1.0
    with pytest.raises(figures._MissingError, match="liger: out of memory"):
        figures._median_ratio({"clock": "cpu", **row}, "liger", "eager")
    assert figures._median_ratio({"clock": "wall", **row}, "chunk checkpoint", "eager") > 0


def test_a_figure_is_asked_for_by_its_name_or_its_beginning() -> None:
    assert figures._wanted(["llama-2k"]) == ["llama-2k"]
    assert figures._wanted(["llama-2"]) == ["llama-2k", "llama-2k-checkpointing", "llama-256"]
    assert figures._wanted([]) == list(measurements.MEASUREMENTS)
    with pytest.raises(SystemExit, match="Did you mean 'llama'"):
        figures._wanted(["lama"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        ("RuntimeError: no kernel", "RuntimeError: no kernel"),
        ("", "exit status 1"),
    ],
)
def test_a_failed_trial_says_why(error: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", f"Traceback\n{error}\n" if error else "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    row = gpu._trial_apart(gpu_arguments(), "mst", 1024, 1.0)
    assert row == {"system": "mst", "seq_len": 1024, "reason": told}


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(UnavailableError, match="needs a GPU"):
        SYSTEMS["liger"](head(**TINY["head"], **CPU), {})
    with pytest.raises(UnavailableError, match="never an MLP"):
        SYSTEMS["auto_chunker"](mlp(**TINY["mlp"], **CPU), {})
    with pytest.raises(UnavailableError, match="does the head alone"):
        SYSTEMS["cut-cross-entropy"](mlp(**TINY["mlp"], **CPU), {})


def test_systems_take_turns_and_rounds_repeat() -> None:
    cells = plan(Question("head", "cpu", "float32", systems=("eager", "mst"), rounds=2))
    assert [c.system for c in cells] == ["eager", "mst", "eager", "mst"]
    cells = plan(Question("compile", "cpu", "float32"))
    assert [(c.system, c.caches) for c in cells[:2]] == [("inductor", "cold"), ("inductor", "warm")]


def test_mistakes_are_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", "--model", "llama3-8b", "--device", "cpu"]) == 2
    assert "8 billion parameters and 395 TFLOP a step are too much for a CPU" in capsys.readouterr().err
    assert main(["bench", "head", "--systems", "indoctor", "--device", "cpu"]) == 2
    assert "Did you mean 'inductor'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            plan(Question("head", "cuda", "bfloat16"))
    assert main(["bench", "head", "--rows", "/nowhere.json"]) == 2
    assert "holds no rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("head --set tokenz=5", "no size 'tokenz'. Did you mean 'tokens'"),
        ("head --set tokens=many", "a number of at least 1"),
        ("head --set tokens=5 --set batch=2", "tokens 5 can't be divided by batch 2"),
        ("mlp --model llama3-8b", "TFLOP a step are too much for a CPU"),
        ("length --lengths 1K", "numbers with commas between"),
        ("length --lengths 1024,99999999", "TFLOP a step are too much for a CPU"),
        ("head --lengths 64", "--set tokens=N"),
        ("model --set checkpointing=1", "true or false"),
        ("head --option chunks=3", "Did you mean 'mst.chunk_tokens'"),
        ("head --steps 0", "--steps 0: at least 1"),
        ("head --minutes -1", "--minutes -1.0: more than 0"),
        ("model --entry tests.models:no_such", "tests.models has no function 'no_such'"),
        ("head --rows rows.json --out copy.json", "--out does not go with it"),
        ("head --out .", "can't be written: Is a directory"),
        ("head --plot tests/conftest.py/plot.png", "can't be written: Not a directory"),
    ],
)
def test_a_mistake_is_one_line(
    given: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mst_fx.bench.command.ask", lambda *_: pytest.fail("work began"))
    assert main(["bench", *given.split(), "--device", "cpu"]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said
    assert "\n" not in said


def test_a_dtype_this_cpu_has_no_instructions_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours are not begun: the command says so, the figures leave the rows of another machine as they are."""
    assert matmul_slowdown(torch.float32) == 1
    assert matmul_slowdown(torch.bfloat16) >= 1
    monkeypatch.setattr(questions, "matmul_slowdown", lambda dtype: 1.0 if dtype == torch.float32 else 150.0)
    assert main(["bench", "head", "--device", "cpu", "--dtype", "bfloat16"]) == 2
    assert "in bfloat16, which it multiplies 150 times as slowly as float32" in capsys.readouterr().err
    assert plan(Question("head", "cpu", "bfloat16", shapes=TINY["head"]))
    assert plan(Question("head", "cpu", "float32"))
    monkeypatch.setattr(measurements, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "prepare_compiler", lambda env: None)
    monkeypatch.setattr(figures, "lines", list)
    monkeypatch.setattr(measurements.Turns, "run", lambda self, steps, clock: {"clock": clock})
    monkeypatch.setattr(sys, "argv", ["figures", "head-bf16", "head-fp32"])
    figures.main()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head-fp32.json"]
    assert "head-bf16: not measured" in capsys.readouterr().err


def test_a_cell_that_takes_too_long_is_a_row() -> None:
    question = Question("mlp", "cpu", "float32", shapes=TINY["mlp"])
    row = run_cell(question, plan(question)[0], "/nowhere", seconds=0.1)
    assert "out of time" in row["reason"]
    assert row["system"] == "eager"


def test_rows_are_saved_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mst_fx.bench.questions.prepare_compiler", lambda env: None)
    monkeypatch.setattr("mst_fx.bench.questions.run_cell", lambda q, cell, *_, **__: row(cell.system))
    kept: list[int] = []
    ask(Question("head", "cpu", "float32", systems=("eager", "mst")), keep=lambda rows: kept.append(len(rows)))
    assert kept == [1, 2]


MEASURED = {
    "head": "--systems inductor,liger,mst --set tokens=40 --set hidden=16 --set vocab=96",
    "mlp": "--systems inductor,chunk_checkpoint,mst --set tokens=40 --set hidden=16 --set intermediate=48",
    "model": "--systems inductor,mst --set seq_len=64 --set checkpointing=true",
    "length": "--systems inductor,mst+checkpoint --lengths 64,128",
    "compile": "--systems inductor,mst --set seq_len=64",
    "model of one's own": "--hf qwen3 --seq-len 64 --systems mst",
}

MODEL = "--set layers=1 --set hidden=32 --set intermediate=64 --set vocab=128 --set heads=4"


@pytest.mark.slow
@pytest.mark.parametrize("question", MEASURED)
def test_the_command_measures(question: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every question to its end: a row for each cell, what can't run with its reason, a picture."""
    given = [a.replace("_checkpoint", " checkpoint") for a in MEASURED[question].split()]
    if "--hf" in given:
        given += [a for k, v in TINY_QWEN.items() for a in ("--set", f"{k}={v}")]
    else:
        given += MODEL.split() if question not in ("head", "mlp") else []
    question = question.partition(" ")[0]
    out, picture = tmp_path / "rows.json", tmp_path / "new" / "plot.png"
    given += ["--device", "cpu", "--steps", "1", "--option", "chunk_tokens=16"]
    assert main(["bench", question, *given, "--out", str(out), "--plot", str(picture)]) == 0
    assert "torch" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    wanted = plan(load_rows(out)[0])
    assert [r["system"] for r in rows] == [c.system for c in wanted]
    for found in rows:
        assert "reason" not in found or found["system"] == "liger", found["reason"]
        if "reason" not in found:
            assert min(found["step_s"], found["first_s"]) > 0
            assert found.get("peak_bytes", 0) >= 0
            assert ("peak_bytes" in found) == (question != "compile")
    if question == "compile":
        assert [r["caches"] for r in rows] == ["cold", "warm"] * 2
    assert picture.read_bytes()[:4] == b"\x89PNG"
