"""Loss curves of `mst-fx finetune` on real text, with mst and with plain Inductor, from the same seed.

    python -m benchmarks.finetune [--steps 60] [--length 1024]

A small Llama with random weights and a tokenizer of its own learns the Python standard library's sources, in fp32. Each
backend is a process of its own, started by the command a user types. Saves ``results/finetune.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.local_model import make_model_folder
from mst_fx.finetune.train import plot_losses

RESULTS = Path(__file__).parent / "results"
ASKED = 1e-3


def run(backend: str, model: Path, folder: Path, steps: int, length: int) -> list[dict[str, Any]]:
    """Fine-tune in a process of its own and return Trainer's log."""
    flags = {
        "--model_name_or_path": model, "--output_dir": folder / backend, "--cache_dir": folder / "cache",
        "--model_max_length": length, "--per_device_train_batch_size": 1, "--gradient_accumulation_steps": 2,
        "--learning_rate": 2e-3, "--lr_scheduler_type": "cosine", "--warmup_steps": 5, "--max_steps": steps,
        "--logging_steps": 1, "--save_strategy": "no", "--backend": backend,
    }  # fmt: skip
    argv = [str(word) for pair in flags.items() for word in pair]
    if backend == "mst":
        argv += ["--option", "chunk_tokens=256"]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "mst_fx.finetune", *argv], check=True)
    return json.loads((folder / backend / "trainer_state.json").read_text())["log_history"]


def main() -> int:
    """Run both, save rows and plot; status 1 if the final losses differ by more than was asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model_folder(
            folder / "model", vocab=2048, positions=args.length, hidden_size=128, intermediate_size=448
        )
        histories = {backend: run(backend, model, folder, args.steps, args.length) for backend in ("inductor", "mst")}
    losses = {b: [row["loss"] for row in rows if "loss" in row] for b, rows in histories.items()}
    pairs = list(zip(losses["mst"], losses["inductor"], strict=True))
    differences = [abs(ours - plain) / plain for ours, plain in pairs]
    result = {
        "torch": torch.__version__, "transformers": transformers.__version__, "device": "cpu", "dtype": "float32",
        "steps": args.steps, "length": args.length, "losses": losses,
        "final_relative_difference": differences[-1], "greatest_relative_difference": max(differences), "asked": ASKED,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "finetune.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_losses(histories, RESULTS / "finetune.png")
    print(
        f"first loss {losses['mst'][0]:.4f}, last {losses['mst'][-1]:.6f} (mst) {losses['inductor'][-1]:.6f} (inductor)"
    )
    print(f"relative difference: last {differences[-1]:.1e}, greatest {max(differences):.1e}, asked {ASKED:.0e}")
    return 0 if differences[-1] <= ASKED else 1


if __name__ == "__main__":
    sys.exit(main())
