"""Finds token-wise regions by dataflow: one walk forward over a Dynamo graph.

Terms:
    amplifier: a projection whose output per token is wider than its input.
    wide: a value that has not been narrowed again since an amplifier.
    terminal: a node whose result is narrow again (a contraction, a per-token loss).
    region: amplifiers, what is between, and terminals. Amplifiers whose wide values meet share a region.
    leaving: a wide value read by something that is not token-wise, or returned.

The walk knows for every wide value which of its dimensions are tokens; ``recorder`` decides for the next
node. What a region reads from outside (hidden states, residuals, labels, masks) is found when it is lifted.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from mst_fx.graph import (
    fake,
    fake_tensor,
    is_differentiable,
    is_parameter_like,
    layout_root,
    ndim,
    node_name,
    source_of,
    storages,
    walking,
)
from mst_fx.inductor import is_plain_fake
from mst_fx.regions.fold import Fold
from mst_fx.regions.losses import per_token, read_total
from mst_fx.regions.projections import Projection, contracts_over_tokens, read_projection
from mst_fx.report import Mismatch
from mst_fx.rowform.recorder import run_node
from mst_fx.rowform.rows import ATTENTION, TWO_OF_TOKENS, MixesTokensError, Row, RowBuilder, feature_shape

AMPLIFICATION = 1.25
"""Least ratio of output to input features that makes a projection an amplifier."""


@dataclass(eq=False)
class Region:
    """A token-wise region of one graph, as found; ``problems`` say why it can't be chunked."""

    module: fx.GraphModule
    in_features: int
    outer: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """For a checkpointed block, its placeholders -> the caller's values."""
    wide_features: int = 0
    kind: Literal["mlp", "loss"] = "mlp"
    """ "loss" if what comes out are a few numbers per token, or nothing but logits."""
    nodes: list[fx.Node] = field(default_factory=list)
    amplifiers: list[fx.Node] = field(default_factory=list)
    projections: dict[fx.Node, Projection] = field(default_factory=dict)
    """How each amplifier reads its input."""
    terminals: list[fx.Node] = field(default_factory=list)
    leaving: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    """(wide value, reader outside) for readers that return the value from the graph."""
    problems: list[Mismatch] = field(default_factory=list)
    source: str = ""
    """Where in the user's code the first amplifier is."""
    feeds_projection: bool = False
    """Whether a wide value is itself the input of an amplifier: then it is a hidden state."""
    row_bytes: int = 0
    """Bytes per token of wide values that no node of the graph shows."""
    fold: Fold = field(default_factory=Fold)
    """What surrounds the region and was taken into ``nodes``."""
    rows: Any = None
    """How many rows there are, where the shape of the first amplifier does not tell."""
    partial_sums: bool = False
    """Whether a chunk forms whole gradients of weights, which are then added: one more copy of them."""
    row_weights: bool = False
    """Whether every token has matrices of its own, taken from a table."""

    @property
    def legal(self) -> bool:
        """Whether nothing found so far forbids chunking."""
        return not self.problems and bool(self.terminals)

    @property
    def ends(self) -> list[fx.Node]:
        """The nodes whose modules say where it is."""
        return self.amplifiers + (self.terminals if self.kind == "mlp" else [])

    def take(self, fold: Fold) -> None:
        """Let ``nodes`` hold what a fold says in the place of what an earlier one did."""
        own = set(self.nodes).difference(self.fold.nodes)
        self.nodes = [n for n in self.module.graph.nodes if n in own or n in fold.nodes]
        self.fold = fold

    def given_back(self) -> list[fx.Node]:
        """Return the values the region gives back: its terminals, or what was folded in behind the only one."""
        read = [t for t in self.terminals if t.users]
        return read if self.fold.exit is None else [self.fold.exit]

    def absorb(self, other: Region) -> None:
        """Take over all of another region."""
        self.in_features = max(self.in_features, other.in_features)
        self.wide_features = max(self.wide_features, other.wide_features)
        for name in ("nodes", "amplifiers", "terminals", "leaving", "problems"):
            getattr(self, name).extend(getattr(other, name))
        self.projections |= other.projections
        self.feeds_projection |= other.feeds_projection


def region_key(region: Region) -> str:
    """Return what a region is known by in a report: the name of its first amplifier in the graph before."""
    first = region.amplifiers[0]
    return first.meta.get("mst_origin", first.name)


def module_stack(region: Region) -> dict[Any, Any]:
    """Return the modules that hold all of a region, outermost first, as FX records them."""
    stacks = [list(n.meta["nn_module_stack"].items()) for n in region.ends if n.meta.get("nn_module_stack")]
    shared = itertools.takewhile(lambda level: all(x == level[0] for x in level), zip(*stacks, strict=False))
    return dict(level[0] for level in shared)


class Walk:
    """One walk over one graph: which values are wide, and which region each belongs to."""

    def __init__(self, module: fx.GraphModule, fake_mode: Any, outer: dict[fx.Node, fx.Node]) -> None:
        self.module, self.fake_mode, self.outer = module, fake_mode, outer
        self.builder = RowBuilder()
        self.wide: dict[fx.Node, Region] = {}
        self.narrow: dict[fx.Node, Region] = {}  # reduced values that may meet wide ones again (a norm inside)
        self.order = {n: i for i, n in enumerate(module.graph.nodes)}
        self.regions: list[Region] = []

    def run(self) -> list[Region]:
        """Walk and return the regions in graph order."""
        with walking(self.module) as nodes:
            for node in nodes:
                self.visit(node)
        for region in self.regions:
            self._trim(region)
            region.nodes.sort(key=self.order.__getitem__)
            region.amplifiers.sort(key=self.order.__getitem__)
            region.terminals.sort(key=self.order.__getitem__)
            scalars = all(read_total(t) or read_projection(t, self.outer) is None for t in region.terminals)
            region.kind = "loss" if scalars and (region.terminals or region.leaving) else "mlp"
            region.source = source_of(region.amplifiers[0])
        return sorted(self.regions, key=lambda r: self.order[r.amplifiers[0]])

    def visit(self, node: fx.Node) -> None:
        """Extend regions by one node, or note why they end."""
        inputs = [n for n in node.all_input_nodes if n in self.wide]
        projection = read_projection(node, self.outer)
        if projection is not None and self._amplifies(node, projection) and not (inputs and _is_complex(node)):
            for n in inputs:
                region = self.wide[n]
                if n is projection.tokens:
                    region.feeds_projection = True
                region.problems.append(self._leaves(n, node, "is projected to something wider still"))
            self._start(node, projection)
            return
        reduced = [n for n in node.all_input_nodes if n in self.narrow]
        if not inputs:
            if (
                reduced
                and node.op != "output"
                and read_total(node) is None
                and len({id(self.narrow[n]) for n in reduced}) == 1
            ):
                self._continue_narrow(self.narrow[reduced[0]], node)
            return
        if node.op == "output":
            for n in inputs:
                self.wide[n].leaving.append((n, node))
            return
        region = self._joined(inputs)
        if any(self.narrow[n] is not region for n in reduced):
            region.problems.append(self._leaves(inputs[0], node, "joins a value reduced from another region"))
            return
        try:
            total = read_total(node)
            if total is not None:
                per_token(self.builder, total, self.fake_mode)
                region.nodes.append(node)
                region.terminals.append(node)
                return
            self._settle(region, node, run_node(self.builder, node, self.fake_mode))
        except MixesTokensError as e:
            region.problems.append(self._leaves(inputs[0], node, str(e)))
        except Exception as e:  # a node that can't be run alone on fakes is a node we do not know
            region.problems.append(self._leaves(inputs[0], node, f"could not be analysed ({type(e).__name__}: {e})"))

    def _continue_narrow(self, region: Region, node: fx.Node) -> None:
        try:
            result = run_node(self.builder, node, self.fake_mode)
        except Exception:  # the narrow value simply leaves the region here
            return
        self._settle(region, node, result, narrow_only=True)

    def _trim(self, region: Region) -> None:
        """Drop what follows the first narrow values unless a wide value needs it; name the terminals."""
        needed = {n for n in region.nodes if n in self.wide or n in region.terminals}
        for node in sorted(region.nodes, key=self.order.__getitem__, reverse=True):
            if node not in needed and any(u in needed for u in node.users):
                needed.add(node)
        members = set(region.nodes)
        for node in region.nodes:
            if node in needed:
                if self._is_given_back(node, members, needed):
                    region.terminals.append(node)
                continue
            if not any(i in needed and i not in region.terminals for i in node.all_input_nodes):
                continue
            picks = [u for u in node.users if u.target is operator.getitem and u in region.nodes]
            several = isinstance(fake(node), (list, tuple))
            region.terminals += [u for u in picks if u not in region.terminals] if several else [node]
            needed |= {node, *picks} if several else {node}
        region.nodes = [n for n in region.nodes if n in needed]

    def _is_given_back(self, node: fx.Node, members: set[fx.Node], needed: set[fx.Node]) -> bool:
        """Whether a narrow value that a wide one needs is read outside too, by more than what is given back for it.

        Computed there a second time it would be other memory, and dropout in front of it another mask.
        """
        if node not in self.narrow or isinstance(fake(node), (list, tuple)):
            return False
        readers = [u for u in node.users if u not in needed]
        follows = len(readers) == 1 or not any(storages(u) & storages(node) for u in readers)
        return bool(readers) and not (follows and members.issuperset(readers))

    def _amplifies(self, node: fx.Node, projection: Projection) -> bool:
        """Whether a projection widens what it is given, and that is no weight itself (a low-rank update of one)."""
        out = fake_tensor(node)
        if out is None or not is_differentiable(out.dtype) or projection.growth <= AMPLIFICATION:
            return False
        return not is_parameter_like(projection.tokens, self.outer)

    def _start(self, node: fx.Node, projection: Projection) -> None:
        value, kinds = fake_tensor(projection.tokens), projection.kinds
        assert value is not None
        region = Region(self.module, _features(value, kinds), self.outer, amplifiers=[node])
        region.projections[node] = projection
        problem = self._illegal_input(projection)
        previous, result = self.builder.lookup(value), None
        try:
            if problem is None:
                self.builder.bind(value, Row(kinds, self.builder.chunked(value, kinds).node))
                result = run_node(self.builder, node, self.fake_mode)
        except MixesTokensError as e:
            problem = str(e)
        except Exception as e:  # a node that can't be run alone on fakes is a node we do not know
            problem = f"could not be analysed ({type(e).__name__}: {e})"
        finally:
            self.builder.unbind(value, previous)
        self.regions.append(region)
        region.wide_features = round(region.in_features * projection.growth)
        if problem or result is None:
            region.nodes.append(node)
            region.problems.append(Mismatch(f"{_title(node)}: {problem}", source_of(node)))
            return
        self._settle(region, node, result, amplifier=True)

    def _illegal_input(self, projection: Projection) -> str | None:
        x, weight = projection.tokens, projection.weight
        if _is_complex(x):
            return "it multiplies complex numbers, which is not supported"
        if contracts_over_tokens(projection, self.outer):
            return "the projection itself mixes tokens: what it sums over was a token dimension before a transpose"
        subclass = next((type(v).__name__ for v in (fake_tensor(x), fake_tensor(weight)) if not is_plain_fake(v)), None)
        if subclass == "Tensor":
            return "it is inside a transform of torch.func (grad, vmap, jvp), which is not supported"
        if subclass is not None:
            return f"a {subclass} is a tensor subclass, which is not supported"
        # One matrix may be an input of the graph; one for each of several batches is then as likely keys or values.
        single = projection.kinds.count(False) == len(projection.contracted)
        root = layout_root(weight)
        given = single and (root.op in ("placeholder", "get_attr") or _picks_rows(root, self.outer))
        if not given and not is_parameter_like(weight, self.outer):
            return TWO_OF_TOKENS if len(projection.kinds) < 3 else ATTENTION  # a contrastive loss has no batches
        return None

    def _joined(self, inputs: list[fx.Node]) -> Region:
        first = min((self.wide[n] for n in inputs), key=lambda r: self.order[r.amplifiers[0]])
        for other in {id(self.wide[n]): self.wide[n] for n in inputs}.values():
            if other is not first:
                first.absorb(other)
                self.regions.remove(other)
                for values in (self.wide, self.narrow):
                    for n, r in values.items():
                        if r is other:
                            values[n] = first
        return first

    def _settle(
        self, region: Region, node: fx.Node, result: Any, amplifier: bool = False, narrow_only: bool = False
    ) -> None:
        """Decide from a node's result whether the value is still wide."""
        rows = bind_results(self.builder, node, result)
        if not rows:
            if not narrow_only:
                region.problems.append(self._leaves(node, node, "does not keep one row per token"))
            return
        widest = max(_features(value, row.kinds) for value, row in rows)
        projection = read_projection(node, self.outer) is not None
        if narrow_only and widest > region.in_features:
            return
        region.nodes.append(node)
        if amplifier or (widest > region.in_features and not (projection and widest <= region.wide_features / 2)):
            self.wide[node] = region
        elif projection:
            region.terminals.append(node)
        elif narrow_only or _reduces(node):
            self.narrow[node] = region
        else:
            self.wide[node] = region  # a slice of a wide value is part of it
        region.wide_features = max(region.wide_features, widest)

    def _leaves(self, value: fx.Node, node: fx.Node, why: str) -> Mismatch:
        if node_name(node) in ("matmul", "bmm"):
            factors = [n for n in node.all_input_nodes if ndim(n) > 2 and not is_parameter_like(n, self.outer)]
            why = ATTENTION if len(factors) > 1 else why
        return Mismatch(f"{_title(node)} {why} ({source_of(node)})", source_of(node))


def bind_results(builder: RowBuilder, node: fx.Node, result: Any) -> list[tuple[torch.Tensor, Row]]:
    """Give the node's own fake values the row forms that running it has found."""
    outs = list(result) if isinstance(result, (list, tuple)) else [result]
    own = fake(node)
    values = list(own) if isinstance(own, (list, tuple)) else [own]
    found = []
    for value, out in zip(values, outs, strict=False):
        row = builder.row(out) if isinstance(out, torch.Tensor) else None
        if row is not None and isinstance(value, torch.Tensor):
            builder.bind(value, row)
            found.append((value, row))
    return found


def find_regions(module: fx.GraphModule, fake_mode: Any, outer: dict[fx.Node, fx.Node] | None = None) -> list[Region]:
    """Return every region of one graph, those that can't be chunked with their problems.

    Args:
        module: A Dynamo graph, or the graph of a checkpointed block.
        fake_mode: The mode of the fake values on its nodes.
        outer: For a checkpointed block, its placeholders -> the caller's values.
    """
    return Walk(module, fake_mode, outer or {}).run()


# -- sizes -------------------------------------------------------------------------------------------


def widens(node: fx.Node) -> bool:
    """Whether a node is a projection whose output per token is wider than its input."""
    projection = read_projection(node)
    out = fake_tensor(node)
    return projection is not None and out is not None and out.is_floating_point() and projection.growth > AMPLIFICATION


def _picks_rows(node: fx.Node, outer: dict[fx.Node, fx.Node]) -> bool:
    """Whether a node picks rows of a parameter by given numbers, as of the negatives of a sampled softmax."""
    if node_name(node) not in ("getitem", "index_select", "embedding"):
        return False
    tables = [n for n in node.all_input_nodes if is_parameter_like(n, outer)]
    numbers = [fake_tensor(n) for n in node.all_input_nodes if n not in tables]
    return len(tables) == 1 and all(v is not None and not is_differentiable(v.dtype) for v in numbers)


def _is_complex(node: fx.Node) -> bool:
    out = fake_tensor(node)
    return out is not None and out.is_complex()


def _features(value: Any, kinds: tuple[bool, ...]) -> int:
    sizes = feature_shape(value.shape, kinds)
    return math.prod(s for s in sizes if isinstance(s, int))


_REDUCTIONS = {"sum", "mean", "logsumexp", "amax", "amin", "max", "min", "argmax", "argmin", "gather", "norm", "var",
               "std", "vector_norm", "take_along_dim"}  # fmt: skip


def _reduces(node: fx.Node) -> bool:
    name = node_name(node)
    return name in _REDUCTIONS or (node.target is operator.getitem and _reduces(node.all_input_nodes[0]))


def _title(node: fx.Node) -> str:
    if node.op == "call_method":
        return f"`.{node.target}`"
    return f"`{getattr(node.target, '__name__', node.target)}`"
