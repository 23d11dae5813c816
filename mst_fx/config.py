"""Options of the backend: parsed once, checked at once, passed down as one frozen value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch._dynamo.exc import ShortenTraceback

PASS_NAMES = (
    "functionalize", "localize_shards", "causal_masks", "normalize", "chunk_loss", "chunk_tokenwise", "chunk_experts",
    "chunk_mlp",
)  # fmt: skip


# NOTE [errors through Dynamo] Dynamo wraps what a backend raises in BackendCompilerFailed, which is
# no ValueError. It lets ShortenTraceback through unchanged (torch 2.11 and 2.13), so the user's
# mistakes derive from both and `except ValueError` works around the first call of the model.
class OptionError(ShortenTraceback, ValueError):
    """An unknown option or a value out of range; the message lists what is valid."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class NothingChunkedError(ShortenTraceback):
    """Raised under ``mst.strict`` when a graph that trains a loss ends with nothing chunked."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


@dataclass(frozen=True)
class Config:
    """Options of one compilation. Fields are documented below themselves."""

    chunk_tokens: int | Literal["auto"] = "auto"
    """Tokens per chunk. An int chunks every legal region with more tokens; "auto" decides from shapes."""
    disable: tuple[str, ...] = ()
    """Names of passes switched off, from ``PASS_NAMES``."""
    logits: Literal["lazy", "keep", "drop"] = "lazy"
    """What a model's returned logits become when its loss was chunked."""
    loss_gradient: Literal["auto", "forward", "recompute"] = "auto"
    """Where the gradients of the loss head are formed."""
    accumulate: Literal["float32", "parameter"] = "float32"
    """Dtype in which a weight gradient is summed over chunks."""
    compiler: Literal["inductor", "aot_eager"] = "inductor"
    """What compiles the rewritten graph and the chunk bodies."""
    strict: bool = False
    """Raise when a graph that trains a loss ends with nothing chunked."""
    share_layers: bool = True
    """Compile equal layers once, as calls of one graph, where anything was chunked (torch >= 2.13)."""
    checkpoint_layers: int = 1
    """How many consecutive checkpointed blocks are recomputed together, so that only one of their inputs is kept."""
    verify_tokenwise: bool = False
    """Try every ``mst_fx.tokenwise`` on random data when it is compiled, and raise where it is not true."""
    inductor: tuple[tuple[str, Any], ...] = field(default=())
    """Inductor's own options, ``mode`` expanded among them, sorted by key."""

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode_options: Mapping[str, Any] | None = None) -> Config:
        """Split ``options`` into ours (keys ``mst.*``) and Inductor's (every other key).

        Args:
            options: What the user gave ``torch.compile(options=...)``.
            mode_options: Inductor options that ``torch.compile(mode=...)`` stands for.

        Raises:
            OptionError: (a ``ValueError``) on an unknown ``mst.`` key, one without its ``mst.``, or a bad value.
        """
        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = dict(mode_options or {})
        for key, value in (options or {}).items():
            if not isinstance(key, str):
                raise OptionError(f"option names are strings, got {key!r}")
            if not key.startswith("mst."):
                if key in _CHECKS:
                    raise OptionError(f"unknown option {key!r}. Did you mean 'mst.{key}'?")
                theirs[key] = value
                continue
            name = key.removeprefix("mst.")
            if name not in _CHECKS:
                valid = [f"mst.{k}" for k in _CHECKS]
                raise OptionError(
                    f"unknown option {key!r}.{did_you_mean(key, valid)} Valid options: {', '.join(valid)}."
                )
            ours[name] = _CHECKS[name](key, value)
        return cls(**ours, inductor=tuple(sorted(theirs.items())))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the nearest known words, nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _choice(*valid: str) -> Any:
    def check(key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in valid:
            raise OptionError(f"{key}={value!r} is not valid; use one of {', '.join(map(repr, valid))}.")
        return value

    return check


def _check_chunk_tokens(key: str, value: Any) -> int | str:
    if value == "auto" and isinstance(value, str):
        return "auto"
    return _check_count(key, value, "'auto' or an int of at least 1 (tokens per chunk)")


def _check_checkpoint_layers(key: str, value: Any) -> int:
    return _check_count(key, value, "an int of at least 1 (layers recomputed together)")


def _check_count(key: str, value: Any, valid: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{key}={value!r} is not valid; use {valid}.")
    return value


def _check_disable(key: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(n in PASS_NAMES for n in names):
        raise OptionError(f"{key}={value!r} is not valid; use a list of names from {', '.join(PASS_NAMES)}.")
    return tuple(sorted(names))


def _check_bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{key}={value!r} is not valid; use True or False.")
    return value


_CHECKS: dict[str, Any] = {
    "chunk_tokens": _check_chunk_tokens,
    "disable": _check_disable,
    "logits": _choice("lazy", "keep", "drop"),
    "loss_gradient": _choice("auto", "forward", "recompute"),
    "accumulate": _choice("float32", "parameter"),
    "compiler": _choice("inductor", "aot_eager"),
    "strict": _check_bool,
    "share_layers": _check_bool,
    "checkpoint_layers": _check_checkpoint_layers,
    "verify_tokenwise": _check_bool,
}
