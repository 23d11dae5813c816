"""Every causal LM of Transformers, tiny: is it exact, what is chunked, and why not where not.

    python -m benchmarks.sweep [MODEL_TYPE ...] [--jobs 2] [--fresh] [--failed]    # runs what has no row yet
    python -m benchmarks.sweep --show | --readme                                   # a table of saved rows

Each model runs in a process of its own, fp32 on the CPU, once without the rewrite and once with it
(``mst.compiler=aot_eager``): loss, logits and every gradient are compared. A model that can't be made small from its
config alone is a row that says why. Rows are saved in ``benchmarks/results/sweep.json`` one by one, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import pathlib
import re
import textwrap
import time
from multiprocessing.connection import wait

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.figures import replace_table
from benchmarks.measurements import RESULTS
from benchmarks.sweep_cell import Row, code_version, work

PATH = RESULTS / "sweep.json"
AUTO = "AutoModelForCausalLM"
SECONDS = 600
PRELOADED = ["benchmarks.sweep_cell", "transformers", "torch._inductor.compile_fx"]


# -- all of them -------------------------------------------------------------------------------------


def sweep(wanted: list[tuple[str, str]], jobs: int, rows: dict[str, Row]) -> None:
    """Run models, ``jobs`` at once, and save every row as it comes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, running = list(reversed(wanted)), {}
    with Progress(*Progress.get_default_columns(), "{task.fields[note]}", console=Console(stderr=True)) as progress:
        task = progress.add_task("models", total=len(waiting), note="")
        while waiting or running:
            while waiting and len(running) < jobs:
                auto, model_type = waiting.pop()
                pipe, end = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(end, model_type, auto), daemon=True)
                process.start()
                end.close()
                running[pipe] = (process, auto, model_type, time.monotonic())
            ready = wait(list(running), timeout=1.0)
            for pipe, (process, auto, model_type, started) in list(running.items()):
                late = time.monotonic() - started > SECONDS
                if pipe not in ready and not late:
                    continue
                row = {"model": model_type, "auto": auto, "status": "crash"}
                try:
                    row = row | {"reason": f"not done in {SECONDS} s"} if late else pipe.recv()
                except EOFError:
                    process.join()
                    row["reason"] = f"the process ended with {process.exitcode}"
                process.kill()
                process.join()
                del running[pipe]
                rows[key(auto, model_type)] = row
                save(rows)
                progress.update(task, advance=1, note=f"{model_type}: {row['status']}")


def key(auto: str, model_type: str) -> str:
    """Return the name of a row."""
    return model_type if auto == AUTO else f"{auto}/{model_type}"


def save(rows: dict[str, Row]) -> None:
    """Write all rows; the file is whole at any time."""
    RESULTS.mkdir(exist_ok=True)
    part = pathlib.Path(f"{PATH}.part")
    part.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    part.replace(PATH)


def model_types(auto: str) -> list[str]:
    """Return the model types that an auto class of Transformers knows."""
    import transformers

    return sorted({c.model_type for c in getattr(transformers, auto)._model_mapping})


# -- tables ------------------------------------------------------------------------------------------


def kind_of_reason(reason: str) -> str:
    """Return a reason without what is particular to one model: places and names of ops before the verb."""
    reason = re.sub(r" ?\([^()]*:\d+\)| ?\(<[^()]*>\)", "", reason.split("; ")[0])
    reason = re.sub(r"^`[^`]*`:? ", "", reason.removeprefix("not legal: ").removeprefix("not supported: "))
    return re.sub(r"\d+(\.\d+)?", "N", reason)


def summary(rows: list[Row]) -> list[str]:
    """Return the table of counts, as Markdown."""
    ran = [r for r in rows if r["status"] in ("exact", "inexact")]
    joined = [r for r in ran if r["loss_chunked"] + r["loss_skipped"]]
    counts = [
        ("model types", len(rows)),
        ("not made small from the config alone", sum(r["status"] == "not built" for r in rows)),
        ("fail without the rewrite too", sum(r["status"] == "plain crash" for r in rows)),
        ("crashed", sum(r["status"] == "crash" for r in rows)),
        ("run", len(ran)),
        ("exact: loss, logits and every gradient", sum(r["status"] == "exact" for r in ran)),
        ("head and loss in one graph", len(joined)),
        ("of these, loss chunked", sum(bool(r["loss_chunked"]) for r in joined)),
        ("with MLPs chunked", sum(bool(r["mlp_chunked"]) for r in ran)),
        ("MLPs chunked", sum(r["mlp_chunked"] for r in ran)),
        ("MLPs and other wide regions left alone", sum(r["mlp_skipped"] for r in ran)),
    ]
    stale = sum(r.get("code") != code_version() for r in rows)
    if stale:
        counts.append(("measured with earlier sources of mst_fx", stale))
    lines = ["| causal LMs of Transformers | count |", "| --- | --- |", *(f"| {n} | {c} |" for n, c in counts)]
    reasons = collections.Counter(
        (s["kind"], kind_of_reason(s["reason"])) for r in ran for s in r["skipped"]
    )  # fmt: skip
    lines += [f"| {kind} left alone: {reason} | {count} |" for (kind, reason), count in reasons.most_common()]
    return lines


def sentence(rows: list[Row]) -> str:
    """Return the counts of most interest in one sentence."""
    ran = [r for r in rows if r["status"] in ("exact", "inexact")]
    exact, chunked = sum(r["status"] == "exact" for r in ran), sum(bool(r["loss_chunked"]) for r in ran)
    mlps = sum(bool(r["mlp_chunked"]) for r in ran)
    told = (
        f"Of the {len(ran)} causal LMs of Transformers that can be made small from their configuration alone, {exact} "
        "give the same loss, logits and gradients to 1e-5, or as near to fp64 as without the rewrite; "
        f"{chunked} have their loss chunked, {mlps} their MLPs (`python -m benchmarks.sweep`)."
    )
    return textwrap.fill(told, 130, break_long_words=False)


def show(rows: list[Row]) -> None:
    """Print one line per model and the counts."""
    table = Table("model", "status", "graphs", "MLPs", "loss", "error", "why")
    for r in rows:
        ran = "graphs" in r
        mlps = f"{r['mlp_chunked']} of {r['mlp_chunked'] + r['mlp_skipped']}" if ran else ""
        loss = f"{r['loss_chunked']} of {r['loss_chunked'] + r['loss_skipped']}" if ran else ""
        why = [r.get("reason", ""), *(f"{s['kind']}: {s['reason']}" for s in r.get("skipped", []))]
        why += r.get("notes", [])
        error = f"{r['error']:.1e} {r['worst'] if r['status'] == 'inexact' else ''}" if ran else ""
        table.add_row(key(r["auto"], r["model"]), r["status"], str(r.get("graphs", "")), mlps, loss, error,
                      "; ".join(dict.fromkeys(filter(None, why)))[:300])  # fmt: skip
    Console(width=200).print(table)
    for line in summary(rows):
        print(line)


def main() -> None:
    """Parse the command line and run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL_TYPE", help="run these again; all without a row by default")
    parser.add_argument("--auto", default=AUTO, help=f"auto class of Transformers, {AUTO} by default")
    parser.add_argument("--jobs", type=int, default=2, help="models at once")
    parser.add_argument("--fresh", action="store_true", help="run all again")
    parser.add_argument("--stale", action="store_true", help="run again what was measured with earlier sources")
    parser.add_argument("--failed", action="store_true", help="run again what is neither exact nor impossible to build")
    parser.add_argument("--show", action="store_true", help="run nothing; print the saved rows")
    parser.add_argument("--readme", action="store_true", help="run nothing; write the counts into benchmarks/README.md")
    args = parser.parse_args()
    rows: dict[str, Row] = json.loads(PATH.read_text()) if PATH.exists() else {}
    if not (args.show or args.readme):
        known = model_types(args.auto)
        unknown = sorted(set(args.models) - set(known))
        if unknown:
            parser.error(f"{args.auto} knows no model type {', '.join(unknown)}")
        failed = {k for k, r in rows.items() if r["status"] not in ("exact", "not built", "plain crash")}
        again = set(rows) if args.fresh else failed if args.failed else set()
        if args.stale:
            again |= {k for k, r in rows.items() if r.get("code") != code_version()}
        wanted = args.models or [m for m in known if key(args.auto, m) not in rows or key(args.auto, m) in again]
        sweep([(args.auto, m) for m in wanted], args.jobs, rows)
    listed = [r for r in rows.values() if r["auto"] == args.auto]
    if args.readme:
        replace_table("sweep", summary(listed))
        replace_table("sweep-summary", [sentence(listed)])
    else:
        show([r for r in listed if not args.models or r["model"] in args.models])


if __name__ == "__main__":
    main()
