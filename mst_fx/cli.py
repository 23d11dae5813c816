"""The ``mst-fx`` command."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

from mst_fx.config import Config, OptionError, did_you_mean


class UsageError(Exception):
    """The command line can't be carried out; the message says what to do."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 on failure, 2 on a mistake in the command line."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (UsageError, OptionError) as e:
        print(f"mst-fx {args.command}: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mst-fx", description="See what the mst backend does.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small Llama with plain Inductor and with mst, side by side")
    demo.add_argument("--out", default="demo-out", help="folder for the plot and the figures")
    demo.add_argument("--device", choices=["cpu", "cuda"])
    demo.add_argument("--steps", type=_at_least(2), help="training steps for each backend")
    demo.add_argument("--seq-len", type=_at_least(64), help="tokens per step")
    demo.set_defaults(run=_demo)
    explain = commands.add_parser("explain", help="say what would be chunked in a model, and why the rest would not")
    model = explain.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--entry", metavar="MODULE:FUNCTION", help="a function that returns a model and its inputs (a dict)"
    )
    model.add_argument("--hf", metavar="MODEL_TYPE", help="a Transformers causal LM of this type, random weights")
    explain.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config values, with --hf")
    explain.add_argument("--batch", type=_at_least(1), default=1)
    explain.add_argument("--seq-len", type=_at_least(1), default=1024)
    explain.add_argument("--checkpointing", action="store_true", help="turn gradient checkpointing on, with --hf")
    explain.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an mst option, e.g. chunk_tokens=512"
    )
    explain.add_argument("--format", choices=["text", "json"], default="text")
    explain.set_defaults(run=_explain)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    parse.__name__ = "int"
    return parse


def _demo(args: argparse.Namespace) -> int:
    try:
        importlib.import_module("transformers")
        importlib.import_module("rich")
        importlib.import_module("matplotlib")
    except ImportError as e:
        raise UsageError(f"{e}; install the extra: pip install 'mst_fx[demo]'") from e
    from mst_fx.demo import run_demo

    return run_demo(args.out, args.device, args.steps, args.seq_len)


def _explain(args: argparse.Namespace) -> int:
    options = {f"mst.{k}": v for k, v in _pairs(args.option).items()}
    Config.parse(options)
    model, inputs = _entry(args.entry) if args.entry else _hf(args)
    import mst_fx

    report = mst_fx.explain(model, options)(**inputs)
    print(json.dumps(report.to_dict(), indent=1) if args.format == "json" else report)
    return 0


def _pairs(items: list[str]) -> dict[str, Any]:
    found = {}
    for item in items:
        key, sep, value = item.partition("=")
        if not sep:
            raise UsageError(f"{item!r} is not of the form NAME=VALUE")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _entry(name: str) -> tuple[Any, dict[str, Any]]:
    module, sep, function = name.partition(":")
    if not sep:
        raise UsageError(f"--entry {name!r} is not of the form package.module:function")
    sys.path.insert(0, "")
    try:
        result = getattr(importlib.import_module(module), function)()
    except Exception as e:
        tail = "".join(traceback.format_exception(e)[-3:])
        raise UsageError(f"--entry {name} failed:\n{tail}") from e
    if not (isinstance(result, tuple) and len(result) == 2 and callable(result[0]) and isinstance(result[1], dict)):
        raise UsageError(f"--entry {name} must return (model, inputs) with inputs a dict, got {type(result).__name__}")
    return result


def _hf(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    try:
        import transformers
    except ImportError as e:
        raise UsageError("--hf needs Transformers: pip install 'mst_fx[hf]'") from e
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if args.hf not in CONFIG_MAPPING:
        raise UsageError(f"unknown model type {args.hf!r}.{did_you_mean(args.hf, CONFIG_MAPPING.keys())}")
    config = CONFIG_MAPPING[args.hf]()
    for key, value in _pairs(args.set).items():
        if not hasattr(config, key):
            raise UsageError(f"{args.hf} has no config value {key!r}.{did_you_mean(key, vars(config))}")
        setattr(config, key, value)
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, config.vocab_size, (args.batch, args.seq_len))
    return model, {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    sys.exit(main())
