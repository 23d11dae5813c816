"""The seam to Inductor and AOTAutograd: with ``dynamo`` and ``kernels``, all that imports private torch.

Facts this file rests on (seen on 2.11 and 2.13):
    * A body compiles inside a backend through ``compile_fx`` under a ``TracingContext`` of its own fake mode.
    * Fake tensors made from one symbolic size share that symbol; no placeholder for it is needed.
    * The AOT cache refuses graphs that call plain Python functions; registered ops are fine.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import gc
import hashlib
import itertools
import pathlib
import platform
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.distributed import Bucket, DDPOptimizer
from torch._dynamo.utils import get_debug_dir
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx, compile_fx_inner, partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.ir import FallbackKernel, InvokeSubgraph
from torch._inductor.virtualized import V
from torch._logging import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from mst_fx import kernels

__all__ = [
    "Bucket", "DDPOptimizer", "apart_from_autograd_settings", "compile_body", "compile_graph", "cpp_wrapper",
    "cpu_multiplies", "debug_folder", "fake_mode_of", "fake_tensors", "global_settings", "mode_options",
    "no_autocast", "old_objects_frozen", "option_names", "partition", "shares_layers", "storage_of", "symbolic_inputs",
    "symbolic_sizes", "torch_version", "trace_artifact", "tracing_in_mode_of", "without_modes",
    "writes_not_looked_for",
]  # fmt: skip

MINIMUM_TORCH = (2, 11)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Return the Inductor options that ``torch.compile(mode=...)`` stands for."""
    return dict(list_mode_options(mode)) if mode else {}


def global_settings() -> tuple[Any, ...]:
    """Return what changes the code made of a graph without being one of its options, alike in every process."""
    config = sorted(inductor_config.save_config_portable().items())
    return (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        hashlib.sha256(repr(config).encode()).hexdigest(),
    )


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


def torch_version() -> tuple[int, ...]:
    """Return torch's major and minor version."""
    return tuple(map(int, torch.__version__.split(".")[:2]))


def shares_layers(compiler: str, options: Mapping[str, Any]) -> bool:
    """Whether what compiles a graph lowers one called several times once, and with all it can do elsewhere."""
    if torch_version() < (2, 13):  # where AOTAutograd's pairing of them was tested
        return False
    return compiler == "aot_eager" or not {**inductor_config.get_config_copy(), **options}["triton.cudagraphs"]


def cpp_wrapper(compiler: str, options: Mapping[str, Any]) -> bool:
    """Whether Inductor would write the code around kernels in C++: that crashes where an op gives a list of one."""
    return compiler != "aot_eager" and bool({**inductor_config.get_config_copy(), **options}["cpp_wrapper"])


@contextlib.contextmanager
def writes_not_looked_for() -> Iterator[None]:
    """Spare AOTAutograd a trace of a layer at every call of its graph, made to refuse writes to what goes in.

    Right only where none of the graphs called writes to an input.
    """
    op = torch.ops.higher_order.invoke_subgraph
    with mock.patch.object(op, "_supports_training_input_mutation", True, create=True):
        yield


@contextlib.contextmanager
def symbolic_sizes(*given: Any) -> Iterator[None]:
    """Let composite ops run on symbolic sizes: torch 2.11's C++ ones ask for integers, which would fix the length.

    Where nothing given has any they are left to C++, which is several times faster.
    """
    leaves = pytree.tree_leaves(given)
    symbolic = any(isinstance(v, py_sym_types) or getattr(v, "_has_symbolic_sizes_strides", False) for v in leaves)
    with enable_python_dispatcher() if symbolic else contextlib.nullcontext():  # on as soon as it is made
        yield


@contextlib.contextmanager
def apart_from_autograd_settings() -> Iterator[None]:
    """Keep what is traced here from the user's hooks, from compiled autograd and from a search for NaN.

    A checkpoint around the compiled function would count what a body saves; compiled autograd would take over the
    backward of a body, and fix its number of rows; anomaly mode would read the values of its gradients.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiled_autograd._disable())
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if torch._C._autograd._saved_tensors_hooks_is_enabled():
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        yield


def fake_tensors() -> FakeTensorMode:
    """Return a context in which tensors are made without memory; real constants may meet them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which tensors are real, whatever is being traced around it."""
    return _disable_current_modes()


@contextlib.contextmanager
def old_objects_frozen() -> Iterator[None]:
    """Spare the garbage collector what is there already; where the user has frozen objects, theirs stay so.

    A compiler makes many objects, and with each batch of them all of torch would be walked again: a twentieth of the
    time.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def option_names() -> list[str]:
    """Return the names of Inductor's options."""
    return list(inductor_config.get_config_copy())


def tracing_in_mode_of(inputs: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Let ``make_fx`` trace with the symbols of its inputs: inside a backend it makes some in Dynamo's fake mode."""
    mode = fake_mode_of(inputs)
    assert mode is not None
    return tracing(TracingContext(mode))


def storage_of(value: torch.Tensor) -> int:
    """Return the identity of a value's storage; under ``torch.func.vmap``, that of what is mapped over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.untyped_storage()._cdata


def is_plain_fake(value: Any) -> bool:
    """Whether a fake value is a plain tensor, no DTensor or other subclass around one."""
    return isinstance(value, FakeTensor)


def symbolic_inputs(body: Any, rows: int) -> list[Any]:
    """Make fake inputs of a body whose chunked inputs share one symbolic number of rows."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    # With symbolic sizes a cache of what ops give costs more than it saves: tracing a body takes a third less without.
    mode.cache_enabled = False
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    # Sizes 0 and 1 are specialized, and torch 2.11 takes the example value for any size that equals it.
    sizes = {0, 1, *(n for s in (*body.chunked, *body.shared) for n in s.shape)}
    rows = next(n for n in itertools.count(rows) if n not in sizes)
    size = mode.from_tensor(torch.empty(rows), symbolic_context=context).shape[0]
    with mode:
        inputs: list[Any] = [torch.empty((size, *s.shape), dtype=s.dtype, device=s.device) for s in body.chunked]
        inputs += [torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device) for s in body.shared]
        if body.has_seed:
            inputs.append(torch.empty((), dtype=torch.int64))
    return inputs


def no_autocast(inputs: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast where the inputs of a body are, for it has its casts in it."""
    device = next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), "cpu")
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def compile_body(
    graph: fx.GraphModule, inputs: Sequence[Any], compiler: str, options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a body's graph; returns a function of real inputs that gives a sequence.

    The number of rows is an input of its own: torch's caches hold code with what it assumes of numbers among the
    inputs (up to which size an index has 32 bits, a sum is made in one go), and ask nothing of sizes of tensors.
    """
    if compiler == "aot_eager":
        return graph
    mode = fake_mode_of(inputs)
    assert mode is not None
    # compile_fx takes over the module it is given, and a deep copy fails on the fake values in its metadata.
    own, rows = fx.Graph(), inputs[0].shape[0]
    own.placeholder("rows").meta["val"] = rows
    own.output(own.graph_copy(graph.graph, {}))
    # A CUDA graph of the outer graph's own would hold those of its bodies, once per chunk size.
    options = {**options, "triton.cudagraphs": False}
    later: Any = kernels.later()
    if inputs[0].device.type != "cpu":
        later = contextlib.nullcontext()
        # One kernel reads a row of logits, twice or three times: a maximum and then a sum of exponentials, each a pass
        # over what the cache holds by then, took 2.8 ms where both in one took 3.0 to 3.2 (H200, 8192 x 128256, bf16).
        options = {"online_softmax": False, **options}
    # compile_fx traces once more: an autocast around the function would cast what the region computes in full.
    with tracing(TracingContext(mode)), torch.no_grad(), no_autocast(inputs), later:
        compiled: Any = compile_fx(fx.GraphModule(graph, own), [rows, *inputs], config_patches=options)  # pyright: ignore
    return lambda *given: compiled(given[0].shape[0], *given)


def compile_graph(
    graph: fx.GraphModule, inputs: Sequence[Any], compiler: str, options: dict[str, Any], chunked: bool
) -> Callable[..., Any]:
    """Compile the outer graph as ``backend="inductor"`` (or "aot_eager") would."""
    with _partitioner_settings(chunked):
        if compiler == "aot_eager":
            return aot_autograd(fw_compiler=_boxed_eager, keep_inference_input_mutations=True)(graph, inputs)
        if not chunked:
            return compile_fx(graph, inputs, config_patches=options or None)  # pyright: ignore
        # Inductor would reorder by its own count of live bytes, which knows nothing of what a loop needs inside.
        options = {"reorder_for_peak_memory": False, **options}
        inner = functools.partial(_compile_apart, compile_fx_inner)
        return compile_fx(graph, inputs, inner_compile=inner, config_patches=options)  # pyright: ignore


def _partitioner_settings(chunked: bool) -> Any:
    """Return the settings AOTAutograd's partitioner runs under.

    NOTE [recompute what feeds a loop] AOTAutograd's partitioner saves whatever must exist as a whole in the backward,
    e.g. a matmul's normed input, although the residual it comes from is saved too. With wide values gone these are
    half of what a Llama layer keeps, so in a chunked graph they may be recomputed, which is pointwise work.
    """
    return functorch_config.patch(ban_recompute_materialized_backward=not chunked)


class _Apart(InductorChoices):
    """NOTE [no fusion across a loop] Inductor fuses nodes that read the same value, however far apart they are run.

    Between two such nodes may lie an attention or the loop of a chunked region, through which all that the later
    one reads and the earlier one writes would stay alive: a norm weight's gradient, or the next checkpointed
    layer's recomputed input. Torch refuses pairs more than 64 nodes apart; a chunked layer has fewer than that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def can_fuse_horizontal(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int
    ) -> bool:
        """Refuse two nodes that read the same value with a call of an op between them."""
        calls = self._calls.get(scheduler)
        if calls is None:
            calls = sorted(n.min_order for n in scheduler.nodes if isinstance(n.node, (FallbackKernel, InvokeSubgraph)))
            self._calls[scheduler] = calls
        first, second = sorted((node1, node2), key=lambda n: n.min_order)
        if bisect.bisect(calls, first.max_order) < bisect.bisect_left(calls, second.min_order):
            return False
        return InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)


def _compile_apart(compile_inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with V.set_choices_handler(_Apart()), kernels.early(), old_objects_frozen():
        return compile_inner(*args, **kwargs)


class _Captured(Exception):
    """Carries graphs out of AOTAutograd, which would go on to compile them."""

    def __init__(self, *graphs: fx.GraphModule) -> None:
        super().__init__()
        self.graphs = graphs


def partition(module: fx.GraphModule, chunked: bool) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """Return the ATen graphs of forward and backward that ``compile_graph`` would hand to Inductor.

    Args:
        module: A Dynamo graph with fake values in ``meta["example_value"]``, or a body's graph with them in
            ``meta["val"]``; it is taken over.
        chunked: As for ``compile_graph``.

    Returns:
        The forward, and the backward or None where the graph doesn't train. Fake values are in ``meta["val"]``.
    """
    output = next(n for n in module.graph.nodes if n.op == "output")
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs, results = (
        [n.meta.get("example_value", n.meta.get("val")) for n in nodes] for nodes in (holders, output.all_input_nodes)
    )
    mode = fake_mode_of(inputs + results) or FakeTensorMode(allow_non_fake_inputs=True)
    trains = any(isinstance(r, torch.Tensor) and r.requires_grad for r in results)

    def take_both(*args: Any, **kwargs: Any) -> Any:
        raise _Captured(*partition_fn(*args, **kwargs))

    def take_forward(graph: fx.GraphModule, _: Any) -> Any:
        device = next((r.device for r in inputs + results if isinstance(r, torch.Tensor)), None)
        raise _Captured(_recursive_joint_graph_passes(graph, input_device=device))

    try:
        with (
            _partitioner_settings(chunked),
            functorch_config.patch(unlift_effect_tokens=True),
            torch.set_grad_enabled(trains),
            V.set_fake_mode(mode),
            tracing(TracingContext(mode)),
        ):
            aot_module_simplified(
                module,
                inputs,
                fw_compiler=take_forward,
                inference_compiler=take_forward,
                partition_fn=take_both,
                decompositions=select_decomp_table(),
                keep_inference_input_mutations=True,
            )
    except _Captured as captured:
        forward, *backward = captured.graphs
        return forward, backward[0] if backward else None
    raise AssertionError("AOTAutograd called no compiler")


def _boxed_eager(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run a graph as it is.

    Some backward ops (of softplus, for one) give other strides than their fakes; a view traced on those would fail.
    """
    from torch._dynamo.backends.debugging import boxed_nop

    aten = torch.ops.aten
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
                node.target = aten.reshape.default
            module.recompile()
    return boxed_nop(graph, inputs)  # pyright: ignore


# -- where torch puts what is to be looked at ---------------------------------------------------------


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to torch's structured trace (``TORCH_TRACE``, read by tlparse); free where none is written."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def debug_folder() -> pathlib.Path | None:
    """Return the folder of ``TORCH_COMPILE_DEBUG=1``, None where nobody asked for one."""
    return pathlib.Path(get_debug_dir()) / "mst_fx" if inductor_config.trace.enabled else None
