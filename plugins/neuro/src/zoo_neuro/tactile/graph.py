"""Graphs of recurrent nodes unrolled in time: who reads whom, with what delay, and in what order it can be computed.

Source: neuroagents-lab/PyTorchTNN ``pt_tnn/temporal_graph.py``; arXiv 2505.18361. Differs: there every node is walked
at every step. Here nodes outside the graph's cycles see their whole input beforehand and go over all steps at once;
what cannot reach a step that is asked for is not computed; and before the first input arrives at a node its outputs,
which then follow from the weights alone, are computed for one row instead of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .nodes import Node, Shape

State = dict[str, Any]


class Wiring:
    """Nodes, edges and delays of a description. Raises ValueError for one that does not hold together."""

    def __init__(self, graph: Mapping[str, Any], full_unroll: bool) -> None:
        lacking = [key for key in ("nodes", "edges", "input_nodes", "output_node") if key not in graph]
        if lacking:
            raise ValueError(f"the graph's description has no {lacking[0]!r}; it has {', '.join(map(str, graph))}")
        self.names: list[str] = [str(node["name"]) for node in graph["nodes"]]
        edges = list(dict.fromkeys((str(e["from"]), str(e["to"])) for e in graph["edges"]))
        self.inputs: list[str] = [str(n) for n in graph["input_nodes"]]
        self.output = str(graph["output_node"])
        joined = {name for edge in edges for name in edge}
        if joined != set(self.names) or len(set(self.names)) != len(self.names):
            odd = sorted(joined ^ set(self.names))
            raise ValueError(f"nodes and edges of the graph do not match: {', '.join(odd) or 'a name occurs twice'}")
        for name in (*self.inputs, self.output):
            if name not in joined:
                raise ValueError(f"the graph has no node {name!r}, which it names as input or output")
        #: whom each node feeds, in the order of the edges, and whom it reads, in the order of the alphabet
        self.feeds = {n: [b for a, b in edges if a == n] for n in dict.fromkeys(n for e in edges for n in e)}
        self.reads = {n: sorted(a for a, b in edges if b == n) for n in self.names}
        self.reach = {n: self._reached(n) for n in self.names}
        lost = set(self.names) - set(self.inputs) - {m for n in self.inputs for m in self.reach[n]}
        if lost:
            raise ValueError(f"no input reaches the nodes {', '.join(sorted(lost))}")
        self.order = self._order(graph.get("ff_order"))
        place = {n: i for i, n in enumerate(self.order)}
        self.delay = {(a, b): 0 if full_unroll and place[a] < place[b] else 1 for a, b in edges}
        self.groups = list(self._groups())

    def _reached(self, start: str) -> set[str]:
        found: set[str] = set()
        todo = list(self.feeds[start])
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += self.feeds[name]
        return found

    def _groups(self) -> Iterator[list[str]]:
        """Nodes that lie on common cycles, each group after those that it reads."""
        waiting = list(self.order)
        while waiting:
            for name in waiting:
                group = [name] + [m for m in waiting if m != name and m in self.reach[name] and name in self.reach[m]]
                if not any(r in waiting for n in group for r in self.reads[n] if r not in group):
                    yield [n for n in self.order if n in group]
                    waiting = [n for n in waiting if n not in group]
                    break

    def cyclic(self, name: str) -> bool:
        return name in self.reach[name]

    def _order(self, given: Sequence[str] | None) -> list[str]:
        """Topological if there is no cycle; else ``ff_order``; else grown from the longest path (see the original)."""
        if not any(self.cyclic(n) for n in self.names):
            order: list[str] = []
            while len(order) < len(self.names):
                order += [n for n in self.names if n not in order and all(r in order for r in self.reads[n])]
            return order
        if given is None:
            given = self._grown()
        if set(given) != set(self.names):
            raise ValueError(f"ff_order is {list(given)}; expected the nodes {', '.join(self.names)}, in some order")
        return list(given)

    def _grown(self) -> list[str]:
        paths = [p for start in self.inputs for p in self._paths([start])]
        if not paths:
            return list(self.names)
        longest = max(len(path) for path in paths)
        order = list(next(path for path in paths if len(path) == longest))
        for name in dict.fromkeys(n for path in paths for n in path):
            if name in order:
                continue
            fed = [i for i, other in enumerate(order) if other in self.feeds[name]]
            fed_by = [i for i, other in enumerate(order) if name in self.feeds[other]]
            order.insert(fed[0] if fed else fed_by[-1] + 1 if fed_by else 0, name)
        return order

    def _paths(self, path: list[str]) -> Iterator[list[str]]:
        """Simple paths to the output, depth first."""
        for name in self.feeds[path[-1]]:
            if name in path:
                continue
            if name == self.output:
                yield [*path, name]
            else:
                yield from self._paths([*path, name])


def widen(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one row where others have the whole batch: expanded to it."""
    batch = max(t.shape[0] for t in tensors)
    return [t if t.shape[0] == batch else t.expand(batch, *t.shape[1:]) for t in tensors]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Steps of (batch, ...) to (batch * steps, ...); maps keep their channels innermost in memory."""
    tensors = widen(tensors)
    if tensors[0].dim() != 4:
        return torch.stack(tensors, 1).flatten(0, 1)
    rows = torch.stack([t.permute(0, 2, 3, 1) for t in tensors], 1).flatten(0, 1)
    return rows.permute(0, 3, 1, 2)


class TemporalGraph(nn.Module):
    """A description {nodes, edges, input_nodes, output_node [, ff_order]} as a network over time.

    ``input_shape``: (channels, height, width) of a frame. ``n_times``: steps of a run on one still frame, and sets of
    BatchNorm where these vary with time. ``full_unroll=False``: every node reads what others made one step before;
    True: nodes are computed in order, and only feedback is one step old. ``return_all=False``: forward gives the last
    step alone. Raises ValueError for a description that does not hold together, naming the node.
    """

    def __init__(
        self,
        graph: Mapping[str, Any],
        input_shape: Sequence[int] | None = None,
        n_times: int | None = None,
        full_unroll: bool = False,
        return_all: bool = True,
    ) -> None:
        super().__init__()
        self.wiring = wiring = Wiring(graph, full_unroll)
        self.input_shape: Shape = tuple(graph["input_shape"] if input_shape is None else input_shape)
        if len(self.input_shape) != 3:
            raise ValueError(f"input_shape is {self.input_shape}; expected (channels, height, width)")
        self.n_times = graph.get("num_timesteps") if n_times is None else n_times
        self.return_all = return_all
        described = {str(node["name"]): node for node in graph["nodes"]}
        widths = {name: int(node["out_channels"]) for name, node in described.items()}
        shapes: dict[str, Shape] = {}
        self.nodes = nn.ModuleDict()
        # A node's map has the size of the node it takes its shape from, which may be made later in the file; feedback
        # from nodes that are not made yet is known by its width, and resized.
        while len(shapes) < len(widths):
            ready = [n for n in wiring.names if n not in shapes and self._known(described[n], shapes)]
            if not ready:
                raise ValueError(f"shape_from of {', '.join(set(widths) - set(shapes))} leads to no input node")
            for name in ready:
                node = described[name]
                source = node.get("shape_from")
                size = self.input_shape[1:] if source is None else shapes[str(source)][1:]
                sources: list[Shape] = [self.input_shape] if name in wiring.inputs else []
                sources += [
                    (widths[m], *shapes[m][1:]) if m in shapes else (widths[m], *size) for m in wiring.reads[name]
                ]
                self.nodes[name] = Node(node, sources, size, self.n_times)
                shapes[name] = self.nodes[name].out_shape  # type: ignore[assignment]
        self.shapes = shapes

    @staticmethod
    def _known(node: Mapping[str, Any], shapes: Mapping[str, Shape]) -> bool:
        return node.get("shape_from") is None or str(node["shape_from"]) in shapes

    @property
    def out_features(self) -> int:
        return int(self.shapes[self.wiring.output][0])

    def _stateful(self, name: str) -> bool:
        return self.nodes[name].cell.stateful  # type: ignore[union-attr, return-value]

    def needed(self, steps: int, wanted: Sequence[int]) -> dict[str, list[int]]:
        """The steps of every node that can reach the output at the ``wanted`` ones; a cell's own past counts, and in
        training all steps of nodes whose BatchNorm keeps statistics of them."""
        counts = [n for n in self.wiring.names if self.training and self.nodes[n].has_norms]
        need: dict[str, set[int]] = {name: set(range(steps)) if name in counts else set() for name in self.wiring.names}
        need[self.wiring.output] |= set(wanted)
        todo = [self.wiring.output, *counts]
        while todo:
            name = todo.pop()
            if need[name] and self._stateful(name):
                need[name] = set(range(max(need[name]) + 1))
            for source in self.wiring.reads[name]:
                delay = self.wiring.delay[source, name]
                more = {t - delay for t in need[name] if t >= delay} - need[source]
                if more:
                    need[source] |= more
                    todo.append(source)
        return {name: sorted(found) for name, found in need.items()}

    def _inputs(self, name: str, t: int, frames: Tensor, outputs: Mapping[str, Mapping[int, Tensor]], rest: Any):
        """What ``name`` reads at step t: the frame, then its sources in the order of the alphabet."""
        found = [frames[:, t]] if name in self.wiring.inputs else []
        for source in self.wiring.reads[name]:
            then = t - self.wiring.delay[source, name]
            found.append(outputs[source][then] if then >= 0 else rest(source))
        return found

    def forward(
        self,
        x: Tensor,
        steps: Sequence[int] | None = None,
        activations: dict[int, dict[str, Tensor]] | None = None,
    ) -> Tensor:
        """(batch, time, channels, height, width), or (batch, channels, height, width) shown at every of ``n_times``
        steps, to the output node's (batch, time, features), or its last step with ``return_all=False``.

        steps: only these, in their order. activations: filled with every node's output at every step.
        """
        if x.dim() == 4 and self.n_times is not None:
            x = x[:, None].expand(-1, self.n_times, -1, -1, -1)
        if x.dim() != 5 or tuple(x.shape[2:]) != self.input_shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (batch, time, {', '.join(map(str, self.input_shape))})"
            )
        batch, length = x.shape[:2]
        wanted = list(range(length)) if steps is None else list(steps)
        if not self.return_all:
            wanted = [length - 1]
        need = self.needed(length, wanted)
        if activations is not None:
            need = {name: list(range(length)) for name in self.wiring.names}
        rows = batch if self.training else 1  # what no input has reached is the same for all, unless chance is at work
        rest = lambda name: x.new_zeros(rows, *self.shapes[name])  # noqa: E731
        outputs: dict[str, dict[int, Tensor]] = {name: {} for name in self.wiring.names}
        for group in self.wiring.groups:
            alone = len(group) == 1 and not self.wiring.cyclic(group[0])
            if alone and self.nodes[group[0]].batches_steps:  # type: ignore[union-attr]
                self._series(group[0], need[group[0]], x, outputs, rest)
            else:
                self._unroll(group, need, x, outputs, rest)
        if activations is not None:
            for t in range(length):
                activations[t] = {n: outputs[n][t].expand(batch, *self.shapes[n]) for n in self.wiring.names}
        made = [outputs[self.wiring.output][t].expand(batch, *self.shapes[self.wiring.output]) for t in wanted]
        return torch.stack(made, 1) if self.return_all else made[-1]

    def _series(self, name: str, ts: list[int], x: Tensor, outputs: dict[str, dict[int, Tensor]], rest: Any) -> None:
        """A node outside all cycles, whose sources are done: all steps at once."""
        if not ts:
            return
        read = [self._inputs(name, t, x, outputs, rest) for t in ts]
        batch = max(t.shape[0] for inputs in read for t in inputs)
        if batch > 1:
            read = [widen([*inputs, x.new_empty(batch, 0)])[:-1] for inputs in read]
        node: Any = self.nodes[name]
        made = node.recomputed(node.series, [stacked(source) for source in zip(*read, strict=True)], len(ts))
        outputs[name] = dict(zip(ts, made.unflatten(0, (-1, len(ts))).unbind(1), strict=True))

    def _unroll(
        self, group: list[str], need: dict[str, list[int]], x: Tensor, outputs: dict[str, dict[int, Tensor]], rest: Any
    ) -> None:
        """Nodes on common cycles, step by step."""
        states: dict[str, Any] = dict.fromkeys(group)
        begun = {name: self.nodes[name].cell.begin(x) for name in group}  # type: ignore[union-attr, operator]
        wanted = {name: set(need[name]) for name in group}
        for t in range(1 + max(max(need[name], default=-1) for name in group)):
            for name in group:
                if t not in wanted[name]:
                    continue
                inputs = widen(self._inputs(name, t, x, outputs, rest))
                state = states[name]
                if state is not None and state.shape[0] != inputs[0].shape[0]:
                    state = state.expand(inputs[0].shape[0], *state.shape[1:])
                outputs[name][t], states[name] = self.nodes[name](inputs, state, t, begun[name])

    # -- one frame at a time

    def init_state(self, batch: int) -> State:
        """A state at rest: no output yet, cells without memory."""
        weight = next(self.parameters())
        zeros = {n: weight.new_zeros(batch, *self.shapes[n]) for n in self.wiring.names}
        return {"time": 0, "outputs": zeros, "cells": dict.fromkeys(self.wiring.names)}

    def step(self, frame: Tensor, state: State) -> Tensor:
        """One frame (batch, channels, height, width) to the output node's (batch, features); ``state`` moves on."""
        if frame.dim() != 4 or tuple(frame.shape[1:]) != self.input_shape:
            raise ValueError(f"a frame has shape {tuple(frame.shape)}; expected (batch, {self.input_shape})")
        made: dict[str, Tensor] = {}
        for name in self.wiring.order:
            inputs = [frame] if name in self.wiring.inputs else []
            for source in self.wiring.reads[name]:
                inputs.append((state["outputs"] if self.wiring.delay[source, name] else made)[source])
            made[name], state["cells"][name] = self.nodes[name](inputs, state["cells"][name], state["time"])
        state["outputs"], state["time"] = made, state["time"] + 1
        return made[self.wiring.output]
