"""The ``mst-fx`` command: its arguments. What carries one out is imported when it is."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 on failure, 2 on a mistake in the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["finetune"]:  # its flags are those of Trainer
        return _answer("finetune", lambda: _finetune(argv[1:]))
    args = _parser(argv[:1] == ["bench"]).parse_args(argv)
    return _answer(args.command, lambda: args.run(args))


def _answer(command: str, run: Callable[[], int]) -> int:
    from mst_fx.commands.models import UsageError
    from mst_fx.config import NothingChunkedError, OptionError
    from mst_fx.regions.promise_check import PromiseError
    from mst_fx.verify import VerifyError

    try:
        return int(run())
    except (UsageError, OptionError) as e:
        return _tell(f"mst-fx {command}: {e}", 2)
    except (NothingChunkedError, PromiseError) as e:
        return _tell(f"mst-fx {command}: {str(e).partition(_ADVICE_OF_DYNAMO)[0]}", 1)
    except KeyboardInterrupt:
        return _tell(f"\nmst-fx {command}: interrupted", 130)
    except VerifyError as e:
        return _tell(f"mst-fx {command}: a pass broke the graph, which is a bug of mst_fx; please report it: {e}", 1)


_ADVICE_OF_DYNAMO = "\n\nSet TORCHDYNAMO_VERBOSE"


def _tell(message: str, status: int) -> int:
    if int(os.environ.get("RANK", "0")) == 0:  # under a launcher all processes say the same
        print(message, file=sys.stderr)
    return status


def _parser(bench_too: bool) -> argparse.ArgumentParser:
    """Return the parser; the arguments of ``bench`` name what it can measure, which takes seconds to import."""
    parser = argparse.ArgumentParser(
        prog="mst-fx", description="See what the mst backend does to a model, measure it, fine-tune with it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small Llama with plain Inductor and with mst, side by side")
    demo.add_argument("--out", default="demo-out", help="folder for the plot and the figures")
    demo.add_argument("--device", choices=["cpu", "cuda"])
    demo.add_argument("--steps", type=_at_least(2), help="training steps for each backend")
    demo.add_argument("--seq-len", type=_at_least(64), help="tokens per step")
    demo.set_defaults(run=_demo)
    shared = _model_arguments()
    explained = commands.add_parser(
        "explain", parents=[shared], help="say what would be chunked in a model, and why the rest would not"
    )
    explained.add_argument("--format", choices=["text", "json"], default="text")
    explained.add_argument("--saved", action="store_true", help="account for what is kept between forward and backward")
    explained.set_defaults(run=lambda args: importlib.import_module("mst_fx.commands.show").run_explain(args))
    diff = commands.add_parser("diff", parents=[shared], help="show a model's graph before and after")
    diff.add_argument("--format", choices=["text", "json", "html"], default="text")
    diff.add_argument("--backward", action="store_true", help="print the backward of every chunk body too")
    diff.add_argument("--html", metavar="FILE", help="write the page too")
    diff.add_argument("--check", action="store_true", help="run it: compare with plain and fp64; status 1 if worse")
    diff.add_argument("--compiler", choices=["aot_eager", "inductor"], help="what compiles both for --check")
    diff.add_argument("--tolerance", type=_share, help="how much larger our relative error may be, for --check")
    diff.set_defaults(run=lambda args: importlib.import_module("mst_fx.commands.show").run_diff(args))
    commands.add_parser(
        "finetune", help="fine-tune a causal LM at a long context; takes Trainer's flags", add_help=False
    )
    bench = commands.add_parser("bench", help="measure mst and its peers on the same work, a process for each")
    if bench_too:
        from mst_fx.bench.command import add_arguments, run_bench

        add_arguments(bench)
        bench.set_defaults(run=run_bench)
    return parser


def _finetune(argv: list[str]) -> int:
    try:
        from mst_fx.finetune.train import run_finetune
    except ImportError as e:
        from mst_fx.commands.models import UsageError

        raise UsageError(f"{e}; install the extra: pip install 'mst_fx[finetune]'") from e
    return run_finetune(argv)


def _model_arguments() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    model = shared.add_mutually_exclusive_group(required=True)
    model.add_argument("--entry", metavar="MODULE:FUNCTION", help="a function: (model, inputs), inputs a dict or tuple")
    model.add_argument("--hf", metavar="PATH_OR_TYPE", help="a causal LM: a folder with config.json, or a model type")
    shared.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="config value, with --hf"
    )
    shared.add_argument("--batch", type=_at_least(1), help="with --hf (1)")
    shared.add_argument("--seq-len", type=_at_least(1), help="with --hf (1024)")
    shared.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], help="cast the model to it (as it is made)"
    )
    shared.add_argument("--device", help="e.g. cuda; where it is made, if not given")
    shared.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, with --hf")
    shared.add_argument("--fake", action="store_true", help="trace with fake tensors: no memory for any size")
    shared.add_argument(
        "--option",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="e.g. chunk_tokens=512, or Inductor's",
    )
    shared.add_argument("--out", metavar="FILE", help="write there rather than on the terminal")
    return shared


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    parse.__name__ = "int"
    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


_share.__name__ = "float"


def _demo(args: argparse.Namespace) -> int:
    try:
        importlib.import_module("transformers")
        importlib.import_module("rich")
        importlib.import_module("matplotlib")
    except ImportError as e:
        from mst_fx.commands.models import UsageError

        raise UsageError(f"{e}; install the extra: pip install 'mst_fx[demo]'") from e
    from mst_fx.commands.demo import run_demo

    return run_demo(args.out, args.device, args.steps, args.seq_len)


if __name__ == "__main__":
    sys.exit(main())
