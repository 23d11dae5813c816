"""How a model is named on a command line: a function of the user's, or a causal LM of Transformers."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import mst_fx
from mst_fx.config import Config, did_you_mean
from mst_fx.inductor import fake_tensors
from mst_fx.recipe import enable_checkpointing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class UsageError(Exception):
    """The command line can't be carried out; the message says what to do."""


@dataclass(frozen=True)
class ModelSpec:
    """What the command line says about a model. None stands for "not given"."""

    entry: str | None = None
    """``package.module:function``, which returns (model, inputs)."""
    hf: str | None = None
    """A folder with ``config.json``, or a model type of Transformers."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values for the config of ``hf``."""
    batch: int | None = None
    seq_len: int | None = None
    dtype: str | None = None
    device: str | None = None
    checkpointing: bool = False
    fake: bool = False
    """Make fake tensors: shapes and dtypes without memory."""


@dataclass(frozen=True)
class Subject:
    """A model and the arguments of one call."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def build_model(spec: ModelSpec) -> Subject:
    """Make the model and its inputs.

    Raises:
        UsageError: If the model can't be made; the message says which part of the command line is to blame.
    """
    if spec.device:
        _check_device(spec)
    with fake_tensors() if spec.fake else contextlib.nullcontext():
        return _from_entry(spec) if spec.entry else _from_hf(spec)


def parse_pairs(items: list[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` items; values are JSON where they can be, else text.

    Raises:
        UsageError: If an item has no ``=``.
    """
    found = {}
    for item in items:
        key, sep, value = item.partition("=")
        if not (sep and key):
            raise UsageError(f"{item!r} is not of the form NAME=VALUE")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def parse_options(items: list[str]) -> dict[str, Any]:
    """Read options of the backend: ours with or without ``mst.``, and Inductor's.

    Raises:
        OptionError: On a name that is neither ours nor Inductor's, or a bad value of one of ours.
    """
    from mst_fx.backend import check_inductor_options  # not above: what is measured beside mst does without it

    ours = set(Config.__dataclass_fields__) - {"inductor"}
    options = {f"mst.{key}" if key in ours else key: value for key, value in parse_pairs(items).items()}
    if isinstance(options.get("mst.disable"), str):
        options["mst.disable"] = tuple(options["mst.disable"].split(","))
    check_inductor_options(Config.parse(options))
    return options


def _check_device(spec: ModelSpec) -> None:
    if spec.device and spec.device.partition(":")[0] == "meta":
        raise UsageError("--device meta: --fake is what traces without memory, for the device the model is to run on")
    try:
        torch.empty(0, device=spec.device)
    except Exception as e:
        # Random initialization is not faked for a device that this torch is built without.
        advice = "; with --fake leave it out: shapes and bytes are the same" if spec.fake else ""
        raise UsageError(f"--device {spec.device} can't be used{advice} ({str(e).splitlines()[0]})") from e


# -- a function of the user's ------------------------------------------------------------------------


def find_entry(name: str) -> Callable[[], Any]:
    """Return the function that ``--entry`` names.

    Raises:
        UsageError: If there is none.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise UsageError(f"--entry {name!r} is not of the form package.module:function")
    if module_name.endswith(".py") or os.sep in module_name:
        meant = module_name.removesuffix(".py").removeprefix("." + os.sep).replace(os.sep, ".")
        raise UsageError(f"--entry {name}: a module's name is needed, as for import: {meant}:{function_name}")
    with _importing_from_here():
        try:
            module = importlib.import_module(module_name)
        except Exception as e:
            raise UsageError(f"--entry {name}: {module_name} can't be imported:\n{short_traceback(e)}") from e
    function = getattr(module, function_name, None)
    if function is not None and not callable(function):
        raise UsageError(f"--entry {name}: {function_name} is no function, but a value {_describe(function)}")
    if function is None:
        near = did_you_mean(function_name, dir(module))
        raise UsageError(f"--entry {name}: {module_name} has no function {function_name!r}.{near}")
    return function


def _from_entry(spec: ModelSpec) -> Subject:
    name = spec.entry or ""
    for given, flag in ((spec.settings, "--set"), (spec.batch, "--batch"), (spec.seq_len, "--seq-len")):
        if given:
            raise UsageError(f"{flag} goes with --hf; the function of --entry makes its own model and inputs")
    if spec.checkpointing:
        raise UsageError("--checkpointing goes with --hf; turn it on in the function of --entry")
    function = find_entry(name)
    with _importing_from_here():
        try:
            result = function()
        except (Exception, SystemExit) as e:
            raise UsageError(f"--entry {name}: {name.partition(':')[2]}() raised:\n{short_traceback(e)}") from e
    if not (isinstance(result, tuple) and len(result) == 2):
        raise UsageError(f"--entry {name} must return (model, inputs), got a value {_describe(result)}")
    model, inputs = result
    if not callable(model):
        raise UsageError(
            f"--entry {name} must return (model, inputs), the model is a value {_describe(model)}, not callable"
        )
    if not isinstance(inputs, (dict, tuple)):
        raise UsageError(f"--entry {name}: the inputs must be a dict or a tuple, got one {_describe(inputs)}")
    model = uncompiled(model)
    dtype = DTYPES[spec.dtype] if spec.dtype else None
    if isinstance(model, torch.nn.Module) and (dtype or spec.device):
        model = model.to(device=spec.device, dtype=dtype)

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        moved = value.detach().to(device=spec.device, dtype=dtype if value.is_floating_point() else None)
        return moved.requires_grad_(value.requires_grad)

    if isinstance(inputs, dict):
        return Subject(model, (), {k: move(v) for k, v in inputs.items()})
    return Subject(model, tuple(map(move, inputs)), {})


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """Undo ``torch.compile`` and ``module.compile``, of parts too: what is compared is compiled by who compares."""
    if not isinstance(model, torch.nn.Module):
        return getattr(model, "_torchdynamo_orig_callable", model)
    own: torch.nn.Module = getattr(model, "_orig_mod", model)
    for module in own.modules():
        module._compiled_call_impl = None
        for name, child in module.named_children():
            if hasattr(child, "_orig_mod"):
                setattr(module, name, child._orig_mod)
    return own


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """Find modules in the working folder, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"that is a tuple of {len(value)}"
    return "that is None" if value is None else f"of type {type(value).__name__}"


def short_traceback(error: BaseException) -> str:
    """Return an error with the frames of the user's own files; all others but the last are left out."""
    own = str(pathlib.Path(mst_fx.__file__).parent) + os.sep
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((own, "<frozen"))]
    users = [f for f in frames if not any(part in f.filename for part in ("-packages" + os.sep, "importlib" + os.sep))]
    lines = traceback.format_list(users or frames[-1:])
    return "".join([*lines, *traceback.format_exception_only(type(error), error)]).rstrip()


# -- Transformers ------------------------------------------------------------------------------------


def _from_hf(spec: ModelSpec) -> Subject:
    try:
        import transformers
    except ImportError as e:
        raise UsageError("--hf needs Transformers: pip install 'mst_fx[hf]'") from e
    folder = pathlib.Path(spec.hf or "")
    config = _config(spec, folder)
    config.use_cache = False
    dtype = DTYPES[spec.dtype] if spec.dtype else None
    weights = folder.is_dir() and any(p for end in ("*.safetensors", "*.bin") for p in folder.glob(end))
    auto = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping and not hasattr(config, "auto_map"):
        raise UsageError(f"--hf {spec.hf}: Transformers has no causal LM of this type; name your model by --entry")
    try:
        with torch.device(spec.device or "cpu"):
            if weights and not spec.fake:
                model = auto.from_pretrained(folder, config=config, dtype=dtype or "auto").to(spec.device)
            else:
                model = auto.from_config(config, **({"dtype": dtype} if dtype else {}))
    except Exception as e:
        raise UsageError(f"--hf {spec.hf}: the model can't be made: {first_line(e)}") from e
    model.train()
    if spec.checkpointing:
        try:
            enable_checkpointing(model)
        except ValueError as e:
            raise UsageError(f"--checkpointing: {first_line(e)}") from e
    vocab = config.get_text_config().vocab_size
    shape = (spec.batch or 1, spec.seq_len or 1024)
    _check_positions(spec, model, shape[1])
    try:
        ids = torch.randint(0, vocab, shape, device=spec.device or "cpu")
    except Exception as e:
        raise UsageError(
            f"--hf {spec.hf}: {shape[0]} x {shape[1]} tokens of {vocab} can't be made: {first_line(e)}"
        ) from e
    return Subject(model, (), {"input_ids": ids, "labels": ids})


def _check_positions(spec: ModelSpec, model: torch.nn.Module, length: int) -> None:
    """Refuse a length for which a table of positions has no rows; rotary and relative ones have no table."""
    for name, table in model.named_modules():
        is_table = isinstance(table, torch.nn.Embedding) and re.search(r"(^|\.)wpe$|position", name)
        if is_table and "relative" not in name and table.num_embeddings < length:  # pyright: ignore
            raise UsageError(
                f"--seq-len {length}: {spec.hf} has {table.num_embeddings} positions (`{name}`); take fewer tokens, or "  # pyright: ignore
                "--set max_position_embeddings"
            )


def _config(spec: ModelSpec, folder: pathlib.Path) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values: dict[str, Any] = {}
    kind = spec.hf or ""
    if folder.is_dir():
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = values.pop("model_type")
        except (OSError, ValueError, KeyError) as e:
            raise UsageError(f"--hf {spec.hf}: the folder has no usable config.json ({first_line(e)})") from e
    elif os.sep in kind:
        raise UsageError(f"--hf {kind}: there is no such folder")
    if kind not in CONFIG_MAPPING:
        raise UsageError(f"--hf: unknown model type {kind!r}.{did_you_mean(kind, CONFIG_MAPPING.keys())}")
    made = CONFIG_MAPPING[kind]
    try:
        known = {*made().to_dict(), *made.attribute_map}
    except Exception as e:
        raise UsageError(f"--hf {kind}: its config has no defaults ({first_line(e)})") from e
    for key in spec.settings:
        if key not in known:
            raise UsageError(f"--set: {kind} has no config value {key!r}.{did_you_mean(key, known)}")
    try:
        # Values go through the constructor: others are derived from them there, e.g. head_dim.
        return made(**{**values, **spec.settings})
    except Exception as e:
        raise UsageError(f"--set: {kind} does not accept these values: {first_line(e)}") from e


def first_line(error: Exception) -> str:
    """Return an error as its name and its first line that is not blank, with the next one where that announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text}"
