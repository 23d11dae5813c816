"""The seam to torch's compiler: the only file that imports private torch.

Facts this file rests on (seen on 2.11 and 2.13):
    * A body compiles inside a backend through ``compile_fx`` under a ``TracingContext`` of its own fake mode.
    * Fake tensors made from one symbolic size share that symbol; no placeholder for it is needed.
    * The AOT cache refuses graphs that call plain Python functions; registered ops are fine.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import get_debug_dir
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import cpu_vec_isa, list_mode_options
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx
from torch._logging import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "compile_body",
    "compile_graph",
    "cpu_multiplies",
    "debug_folder",
    "fake_mode_of",
    "fake_tensors",
    "finish_kernels",
    "kernels_at_once",
    "mode_options",
    "option_names",
    "probe_cpu",
    "symbolic_inputs",
    "trace_artifact",
]

MINIMUM_TORCH = (2, 11)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Return the Inductor options that ``torch.compile(mode=...)`` stands for."""
    return dict(list_mode_options(mode)) if mode else {}


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a low-precision dtype.

    On x86 oneDNN says it supports bf16 wherever there is AVX-512, and emulates it at a quarter of fp32's speed.
    """
    if dtype is torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return name is None or bool(getattr(torch.ops.mkldnn, name)())


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode | None:
    """Return the fake mode of a graph's example values.

    While a backend runs, the tracing context holds another mode, so ``detect_fake_mode`` is of no use here.
    """
    inner = [getattr(v, n) for v in values if is_traceable_wrapper_subclass(v) for n in v.__tensor_flatten__()[0]]
    return next((v.fake_mode for v in [*values, *inner] if isinstance(v, FakeTensor)), None)


def fake_tensors() -> FakeTensorMode:
    """Return a context in which tensors are made without memory; real constants may meet them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def option_names() -> list[str]:
    """Return the names of Inductor's options."""
    return list(inductor_config.get_config_copy())


def is_plain_fake(value: Any) -> bool:
    """Whether a fake value is a plain tensor, no DTensor or other subclass around one."""
    return isinstance(value, FakeTensor)


def symbolic_inputs(body: Any, rows: int) -> list[Any]:
    """Make fake inputs of a body whose chunked inputs share one symbolic number of rows."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    # Sizes 0 and 1 are specialized, so the example value is at least 2.
    size = mode.from_tensor(torch.empty(max(rows, 2)), symbolic_context=context).shape[0]
    with mode:
        inputs: list[Any] = [torch.empty((size, *s.shape), dtype=s.dtype, device=s.device) for s in body.chunked]
        inputs += [torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device) for s in body.shared]
        if body.has_seed:
            inputs.append(torch.empty((), dtype=torch.int64))
    return inputs


def compile_body(
    graph: fx.GraphModule, inputs: Sequence[Any], compiler: str, options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a body's graph; returns a function of real inputs that gives a sequence."""
    if compiler == "aot_eager":
        return graph
    mode = fake_mode_of(inputs)
    assert mode is not None
    # compile_fx takes over the module it is given, and a deep copy fails on the fake values in its metadata.
    own = fx.Graph()
    own.output(own.graph_copy(graph.graph, {}))
    later = inputs[0].device.type == "cpu" and not _at_once
    with tracing(TracingContext(mode)), torch.no_grad(), _kernels_later() if later else contextlib.nullcontext():
        return compile_fx(fx.GraphModule(graph, own), list(inputs), config_patches=options or None)  # pyright: ignore


def compile_graph(
    graph: fx.GraphModule, inputs: Sequence[Any], compiler: str, options: dict[str, Any], chunked: bool
) -> Callable[..., Any]:
    """Compile the outer graph as ``backend="inductor"`` (or "aot_eager") would.

    NOTE [recompute what feeds a loop] AOTAutograd's partitioner saves whatever must exist as a whole in the
    backward, e.g. the normed input of a matmul, although the residual it comes from is saved too. With wide
    values gone these are the largest term (half of what a Llama layer keeps, and the S x S mask), so in a
    graph with chunked regions they may be recomputed, which is pointwise work.
    """
    with functorch_config.patch(ban_recompute_materialized_backward=not chunked):
        if compiler == "aot_eager":
            return aot_autograd(fw_compiler=_boxed_eager)(graph, inputs)
        return compile_fx(graph, inputs, config_patches=options or None)  # pyright: ignore


def _boxed_eager(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    from torch._dynamo.backends.debugging import boxed_nop

    return boxed_nop(graph, inputs)  # pyright: ignore


# -- where torch puts what is to be looked at ---------------------------------------------------------


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to torch's structured trace (``TORCH_TRACE``, read by tlparse); free where none is written."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def debug_folder() -> pathlib.Path | None:
    """Return the folder of ``TORCH_COMPILE_DEBUG=1``, None where nobody asked for one."""
    return pathlib.Path(get_debug_dir()) / "mst_fx" if inductor_config.trace.enabled else None


# -- C++ compilers in the background -----------------------------------------------------------------

_waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []
_at_once: list[bool] = []


@contextlib.contextmanager
def _kernels_later() -> Iterator[None]:
    """Do not wait for a body's C++ kernels: they compile while the next body and the outer graph are lowered.

    Inductor's generated module starts its kernels' compilers and then waits; its functions look kernels up in
    the module's globals only when they run, so the wait can come later.
    """
    with mock.patch.object(AsyncCompile, "wait", lambda kernels, scope: _waiting.append((kernels, scope))):
        yield


def finish_kernels() -> None:
    """Wait for the C++ kernels of bodies compiled so far; raises what a C++ compiler raised."""
    waiting = [*_waiting]
    _waiting.clear()
    for kernels, scope in waiting:
        kernels.wait(scope)


@contextlib.contextmanager
def kernels_at_once() -> Iterator[None]:
    """Compile each body to the end before the next, so that an error is raised where the body is known."""
    _at_once.append(True)
    try:
        yield
    finally:
        _at_once.pop()


def probe_cpu() -> None:
    """Start in the background what Inductor asks the C++ compiler once per machine: which vector instructions work.

    Inductor asks for one instruction set after another when it meets its first CPU kernel; here they are built side
    by side while Dynamo traces. The answers are cached by torch, in the process and on disk.
    """
    if torch.cuda.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return
    present = cpu_vec_isa.x86_isa_checker()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        if all(flag in present for flag in str(isa).split()):
            threading.Thread(target=bool, args=(isa,), daemon=True).start()
