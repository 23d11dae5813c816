"""Live bytes over forward and backward, estimated from the partitioned ATen graphs without running them.

What is modelled of the run: a pointwise step writes over an input of its size that dies there; values saved for
the backward die at their last use in it; gradients of outputs are held by autograd for the whole backward (zeros
where the caller's loss doesn't use an output); gradients of inputs live to the end; a loop over chunks adds one
chunk's values and its accumulators.

Not modelled: Inductor's own order of steps, workspaces of library kernels, what the caller keeps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx

from mst_fx.diff.loop_memory import loop_bytes
from mst_fx.diff.steps import Key, Moment, Program, build_program, flat, path_of, simulate, value_bytes
from mst_fx.graph import source_of
from mst_fx.inductor import partition
from mst_fx.pipeline import copy_graph
from mst_fx.printing import target_text, type_text


@dataclass(frozen=True)
class Saved:
    """A buffer that the forward keeps for the backward."""

    text: str
    """Dtype, shape and op, e.g. ``bfloat16[1, 4096, 2048] mm``."""
    source: str
    """``file:line`` of the user's code, "" where no record leads there."""
    path: str
    """Module that made it, "" where none is known."""
    bytes: int

    @property
    def kind(self) -> tuple[str, str, int]:
        """What is equal for the same value of equal layers."""
        return self.text, re.sub(r"\.\d+\b", ".#", f"{self.source} {self.path}"), self.bytes


@dataclass(frozen=True)
class Timeline:
    """Live bytes of one forward and backward, estimated from shapes."""

    moments: tuple[Moment, ...]
    saved: tuple[Saved, ...]
    """What the forward keeps for the backward, inputs and parameters left out."""
    peak_bytes: int
    """Bytes over the start at the worst moment."""
    peak: Moment | None
    largest_bytes: int
    """Bytes of the largest value that takes memory."""
    largest: str
    """That value's dtype, shape and op, e.g. ``float32[4096, 32000] mm``."""

    @property
    def saved_bytes(self) -> int:
        """Bytes the forward keeps for the backward."""
        return sum(s.bytes for s in self.saved)


def timeline(module: fx.GraphModule, chunked: bool) -> Timeline:
    """Estimate the live bytes of forward and backward of a graph, compiled by Inductor.

    Args:
        module: A Dynamo graph, as in ``GraphPair``; left as it is.
        chunked: Whether regions of it were chunked; the partitioner's settings depend on it.

    Memory:
        None of the graph's: fake tensors only.
    """
    with module.meta.get("mst_ambient", torch.no_grad)():
        forward_graph, backward_graph = partition(copy_graph(module), chunked)
    forward = _program(forward_graph, "forward", {})
    if backward_graph is None:
        return _timeline([simulate(forward, {}, set(), set())], [forward], {})
    named = {n.name: n for n in forward_graph.graph.nodes}
    refs: dict[fx.Node, frozenset[Key]] = {}
    tangents: dict[Key, int] = {}
    for node in backward_graph.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in named:
            refs[node] = forward.refs[named[node.name]]
        elif isinstance(value := node.meta.get("val"), torch.Tensor):
            refs[node] = frozenset([key := Key("backward", node.name)])
            tangents[key] = value_bytes(value)
    kept = set().union(*refs.values())
    saved = {key: size for step in forward.steps for key, size in step.writes.items() if key in kept}
    backward = _program(backward_graph, "backward", refs)
    held = sum(1 for n in backward_graph.graph.nodes if n.op == "placeholder" and n.name in named)
    returned = set().union(*forward.results[: max(0, len(forward.results) - held)])
    phases = [
        simulate(forward, {}, set(), set()),
        simulate(backward, {**saved, **tangents}, set(tangents), returned | set(tangents)),
    ]
    return _timeline(phases, [forward, backward], saved)


def _program(module: fx.GraphModule, phase: str, refs: dict[fx.Node, frozenset[Key]]) -> Program:
    program = build_program(module, phase, refs)
    for step in program.steps:
        step.transient = loop_bytes(step.node)
    return program


def _timeline(phases: list[list[Moment]], programs: list[Program], saved: dict[Key, int]) -> Timeline:
    moments = tuple(m for phase in phases for m in phase)
    peak = max(moments, key=lambda m: m.live_bytes, default=None)
    written = {key: (count, s.node) for p in programs for s in p.steps for key, count in s.writes.items()}
    size, node = max(written.values(), key=lambda pair: pair[0], default=(0, None))
    text = f"{type_text(node.meta.get('val'))} {target_text(node)}".strip() if node else ""
    kept = tuple(_saved(key, *written[key]) for key in saved)
    return Timeline(moments, kept, peak.live_bytes if peak else 0, peak, size, text)


def _saved(key: Key, size: int, node: fx.Node) -> Saved:
    text, source = f"{type_text(flat(node.meta['val'])[key.result])} {target_text(node)}", source_of(node)
    return Saved(text, "" if "<" in source else source, path_of(node), size)
