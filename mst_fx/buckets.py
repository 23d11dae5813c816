"""DistributedDataParallel: a graph is rewritten first and cut by gradient bucket then.

Under DDP, Dynamo cuts the graph by gradient bucket, so that the gradients of one bucket are reduced while the
backward computes the next, and hands the pieces to the backend. A cut can go through an MLP or between head and
loss: no region is whole in any piece. So this backend, and no other one, is given the whole graph, and what it
makes of it is cut by the same code of torch's. A region is one node by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mst_fx import inductor
from mst_fx.inductor import Bucket, DDPOptimizer

_asked: list[DDPOptimizer] = []
"""DDP's request to cut the graph that is being compiled."""
_cut = DDPOptimizer.compile_fn


class _Buckets(DDPOptimizer):
    """Torch's cutter, which counts the parameters in a region's lists of inputs too."""

    def add_param_args(self, bucket: Bucket, node: fx.Node) -> None:
        for holder in node.all_input_nodes:
            parameter = holder.meta.get("example_value") if holder.op == "placeholder" else None
            if isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad:
                if not self._ignore_parameter(parameter):
                    self.add_param(bucket, parameter, str(holder.target))


def cutting() -> bool:
    """Whether DDP asks for the graph that is being compiled to be cut."""
    return bool(_asked)


def compile_graph(
    graph: fx.GraphModule, inputs: Sequence[Any], compiler: str, options: dict[str, Any], chunked: bool
) -> Callable[..., Any]:
    """Compile a rewritten graph in one piece, or in DDP's where DDP asks for them."""
    compile_piece = functools.partial(inductor.compile_graph, compiler=compiler, options=options, chunked=chunked)
    if not cutting():
        return compile_piece(graph, inputs)
    return _cut(_Buckets(_asked[-1].bucket_bytes_cap, compile_piece, _asked[-1].first_bucket_cap), graph, list(inputs))


def rewrite_before_cutting(backend: Callable[..., Any]) -> None:
    """Have Dynamo call ``backend`` with whole graphs under DDP; other backends see what they always did."""

    @functools.wraps(_cut)
    def compile_fn(self: DDPOptimizer, gm: fx.GraphModule, example_inputs: list[Any], **configs: Any) -> Any:
        if _innermost(self.backend_compile_fn) is not backend:
            return _cut(self, gm, example_inputs, **configs)
        _asked.append(self)
        try:
            return self.backend_compile_fn(gm, example_inputs, **configs)
        finally:
            _asked.pop()

    DDPOptimizer.compile_fn = compile_fn


def _innermost(compiler: Any) -> Any:
    """Unwrap what ``torch.compile`` puts around a backend."""
    while True:
        names = ("_torchdynamo_orig_backend", "compiler_fn", "func")
        inner = next((getattr(compiler, n) for n in names if hasattr(compiler, n)), None)
        if inner is None:
            return compiler
        compiler = inner
