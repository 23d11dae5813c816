"""Engines on real process groups: gradient error, weights gathered per step, peak memory per rank.

    python -m benchmarks.engines [ddp fsdp2 zero1 zero2 zero3 tensor-parallel] [--ranks 2] [--set seq_len=512]
    python -m benchmarks.engines --show | --readme      # run nothing: the table of saved rows, here or in README.md

The work is the llama of ``mst_fx.bench.works``. Every cell is ``ranks`` processes of one thread that meet over gloo
(nccl with ``--device cuda``); ``inductor`` and ``mst`` each compile the same wrapped model. The gradients are compared
with those of one process on the joined batch, in fp64, eager. Rows are saved under ``benchmarks/results`` cell by cell.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from benchmarks.figures import replace_table
from benchmarks.measurements import load, save
from mst_fx.bench.works import llama, sizes_of
from mst_fx.commands.models import parse_pairs
from mst_fx.measure import MALLOC_ENV, peak_over_start, prepare_compiler

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "tensor-parallel")
SYSTEMS = ("inductor", "mst")


def wrap(engine: str, model: Any, world: int, compile_with: dict[str, Any], device: str) -> tuple[Any, Any]:
    """Hand a model to an engine and compile it; returns what to call, and what runs the backward of a loss."""
    if engine == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        # The smallest buckets torch's cutter takes: real models fill many.
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
        return torch.compile(wrapped, **compile_with), torch.Tensor.backward
    mesh = dist.init_device_mesh(device, (world,))
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in [*model.model.layers, model]:
            fully_shard(layer, mesh=mesh)
        model.compile(**compile_with)
        return model, torch.Tensor.backward
    if engine == "tensor-parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        for layer in model.model.layers:
            plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
            parallelize_module(layer.mlp, mesh, plan)
        model.compile(**compile_with)
        return model, torch.Tensor.backward
    import deepspeed  # pyright: ignore[reportMissingImports]

    zero = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    if engine == "zero3":
        deepspeed.utils.set_z3_leaf_modules(model, [type(model.model.layers[0].mlp)])
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wrapped, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer, dist_init_required=False)
    compile_kwargs = {k: v for k, v in compile_with.items() if k != "backend"}
    wrapped.compile(backend=compile_with["backend"], compile_kwargs=compile_kwargs)
    return wrapped, wrapped.backward


def gradients(engine: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return whole gradients under the names of the model as it was built."""
    found = {}
    for name, p in model.named_parameters():
        if engine.startswith("zero"):
            from deepspeed.utils import safe_get_full_grad  # pyright: ignore[reportMissingImports]

            grad = safe_get_full_grad(p)
        else:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad  # pyright: ignore
        assert grad is not None
        found[name.replace("_orig_mod.", "").removeprefix("module.")] = grad
    return found


def count_collectives(step: Any) -> dict[str, int]:
    """Run a step and count the collectives this rank took part in: those that gather weights, and all."""
    with torch.profiler.profile() as profile:
        step()
    names = [event.name for event in profile.events() or () if event.name.startswith("c10d::")]
    return {"gathers": sum("gather" in name for name in names), "collectives": len(names)}


def true_gradients(model: nn.Module, batches: list[torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Return the gradients of one process on the joined batch, in fp64; made by the first rank that ever asks."""
    if dist.get_rank() == 0 and not path.exists():
        wide: Any = copy.deepcopy(model).double()
        for batch in batches:
            (wide(input_ids=batch, labels=batch).loss / len(batches)).backward()
        torch.save({n: p.grad for n, p in wide.named_parameters()}, path)
    dist.barrier()
    return torch.load(path, mmap=True)


def rank_main(args: argparse.Namespace) -> dict[str, Any]:
    """Run one cell in one rank and return its row."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    work = llama(**parse_pairs(args.set), dtype=torch.float32, device=args.device)
    model: Any = work.module
    ids = work.inputs["input_ids"]
    torch.manual_seed(1)
    batches = [torch.randint(0, model.config.vocab_size, ids.shape, device=args.device) for _ in range(world)]
    if args.engine == "tensor-parallel":
        batches = batches[:1] * world
    alone = args.engine == "tensor-parallel"
    truth = true_gradients(model, batches[: 1 if alone else world], Path(args.truth, f"{alone}")) if args.error else {}
    options = {"mst.chunk_tokens": args.chunk_tokens} if args.system == "mst" else None
    compile_with = {"backend": args.system, **({"options": options} if options else {})}
    wrapped, backward = wrap(args.engine, model, world, compile_with, args.device)

    def step() -> None:
        loss = wrapped(input_ids=batches[rank], labels=batches[rank]).loss
        backward(loss)

    def clear() -> None:
        if args.engine.startswith("zero"):
            wrapped.step()
        model.zero_grad(set_to_none=True)

    row: dict[str, Any] = {}
    step()
    if args.error:
        grads = gradients(args.engine, model)
        errors = {n: float((grads[n].view_as(t).double() - t).norm() / t.norm()) for n, t in truth.items()}
        row["worst_error"] = max(errors.values())
        del grads
    truth.clear()
    clear()
    row |= count_collectives(step)
    clear()
    if args.peak:
        row["peak_bytes"], _ = peak_over_start(step, args.device)
        clear()
    import mst_fx

    regions = [r for report in mst_fx.reports() for r in report.regions]
    row["regions"] = [[r.kind, r.status, r.reason] for r in regions]
    return row


def child(args: argparse.Namespace) -> None:
    """Be one rank: join the others, run, leave the row in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", f"file://{args.folder}/store",
                            rank=args.rank, world_size=args.ranks)  # fmt: skip
    row = rank_main(args)
    Path(args.folder, f"row{args.rank}").write_text(json.dumps(row))
    dist.barrier()
    os._exit(0)  # engines leave threads that would wait for each other


def cell(engine: str, system: str, truth: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one engine with one system; returns a row per rank. ``truth`` is a folder that cells share."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engines", "--engine", engine, "--system", system,
                   "--folder", folder, "--truth", truth, "--ranks", str(args.ranks), "--device", args.device,
                   "--chunk-tokens", str(args.chunk_tokens), *(f"--set={s}" for s in args.set)]  # fmt: skip
        command += [] if args.peak else ["--no-peak"]
        command += [] if args.error else ["--no-error"]
        size = str(args.ranks)
        env = {**os.environ, **MALLOC_ENV, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "5", "LOCAL_SIZE": size,
               "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # fmt: skip
        children = []
        for rank in range(args.ranks):
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with Path(folder, f"log{rank}").open("w") as log:
                children.append(
                    subprocess.Popen([*command, "--rank", str(rank)], env=own, stdout=log, stderr=subprocess.STDOUT)
                )
        for process in children:
            process.wait()
        for rank, process in enumerate(children):
            if process.returncode:
                raise SystemExit(f"{engine}, {system}, rank {rank}:\n{Path(folder, f'log{rank}').read_text()[-3000:]}")
        return [json.loads(Path(folder, f"row{r}").read_text()) for r in range(args.ranks)]


HEADER = ("engine", "S", "worst gradient error", "all-gathers", "collectives", "peak per rank, MiB", "ratio", "chunked")


def lines(saved: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of saved rows: plain Inductor -> mst, the worst of all ranks."""
    found = []
    for engine in ENGINES:
        systems = saved["engines"].get(engine, {})
        if set(systems) != set(SYSTEMS):
            continue
        plain, ours = (systems[s]["ranks_rows"] for s in SYSTEMS)
        error = " -> ".join(f"{max(r['worst_error'] for r in s):.1e}" for s in (plain, ours) if "worst_error" in s[0])
        counts = [" -> ".join(str(max(r[k] for r in s)) for s in (plain, ours)) for k in ("gathers", "collectives")]
        peak = ratio = ""
        if "peak_bytes" in ours[0]:
            most = [max(r["peak_bytes"] for r in s) for s in (plain, ours)]
            peak, ratio = f"{most[0] / 2**20:.0f} -> {most[1] / 2**20:.0f}", f"{most[1] / most[0]:.2f}"
        done = sum(status == "chunked" for _, status, _ in ours[0]["regions"])
        length = str({**sizes_of("llama"), **systems["mst"]["shapes"]}["seq_len"])
        found.append((engine, length, error, *counts, peak, ratio, f"{done} of {len(ours[0]['regions'])}"))
    return found


def show(saved: dict[str, Any], readme: bool) -> None:
    """Print the table of saved rows, or put it between the README's markers."""
    if readme:
        replace_table("engines", [f"| {' | '.join(r)} |" for r in (HEADER, ("---",) * len(HEADER), *lines(saved))])
        return
    table = Table(*HEADER)
    for line in lines(saved):
        table.add_row(*line)
    Console(width=130).print(table)


def main() -> None:
    """Run the cells asked for, save their rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"{', '.join(ENGINES)}; all by default")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], metavar="SIZE=N")
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--no-peak", dest="peak", action="store_false")
    parser.add_argument("--no-error", dest="error", action="store_false")
    parser.add_argument("--name", default="engines", help="file to save rows under; rows of other cells in it stay")
    parser.add_argument("--only", choices=SYSTEMS, help="run one system, the other's rows are there from before")
    parser.add_argument("--show", action="store_true", help="run nothing; print the saved rows")
    parser.add_argument("--readme", action="store_true", help="run nothing; write the saved rows into README.md")
    for hidden in ("--engine", "--system", "--folder", "--truth"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        child(args)
    unknown = set(args.engines) - set(ENGINES)
    if unknown:
        parser.error(f"unknown engine {', '.join(sorted(unknown))}; choose from {', '.join(ENGINES)}")
    saved: dict[str, Any] = load(args.name) or {"engines": {}}
    if args.show or args.readme:
        show(saved, args.readme)
        return
    prepare_compiler(dict(os.environ))
    about = {
        "shapes": parse_pairs(args.set), "ranks": args.ranks, "device": args.device, "chunk_tokens": args.chunk_tokens,
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "mst_fx")},
    }  # fmt: skip
    systems = [args.only] if args.only else SYSTEMS
    with tempfile.TemporaryDirectory() as truth, Progress(console=Console(stderr=True)) as progress:
        engines = args.engines or ENGINES
        task = progress.add_task("engines", total=len(systems) * len(engines))
        for engine in engines:
            rows = saved["engines"].setdefault(engine, {})
            for system in systems:
                progress.update(task, description=f"{engine}, {system}")
                rows[system] = {**about, "ranks_rows": cell(engine, system, truth, args)}
                progress.advance(task)
                save(args.name, saved)
    show(saved, readme=False)


if __name__ == "__main__":
    main()
