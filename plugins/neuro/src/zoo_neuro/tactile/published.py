"""The graph of the paper's ConvRNNs ("Zhuang"): facts of arXiv 2505.18361 and its ``rnn_fdb_converted_modern*``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Our names of the cells and the original's.
CELL_NAMES = {
    "time_decay": "TimeDecayRecurrentCell",
    "intersection": "IntersectionRNNCell",
    "ugrnn": "UGRNNCell",
    "gru": "GRUCell",
    "lstm": "LSTMCell",
    "vanilla": "VanillaRNNCell",
    "identity": "IdentityCell",
}
WIDTHS = (96, 128, 256, 384, 384, 256)
#: Which convolutions each feeds, as pairs of their numbers: forward, and back over one and two areas.
FORWARD = ((1, 2), (2, 3), (3, 4), (4, 5), (5, 6))
FEEDBACK = ((3, 2), (4, 2), (4, 3), (5, 3), (5, 4), (6, 4), (6, 5))
#: Convolutions that the first fully connected node reads beside the last.
SKIPS = (4, 2)


def zhuang_graph(
    cell: str = "time_decay",
    layernorm: bool = False,
    widths: Sequence[int] = WIDTHS,
    hidden: int = 1024,
    repr_dim: int = 512,
    trainable: bool = True,
) -> dict[str, Any]:
    """Six convolutions of 2 x 2 with feedback, and two fully connected nodes that also read areas 4 and 2.

    cell: of the convolutions, a name of :data:`CELL_NAMES`; fully connected nodes decay with time in the graph of
    "time_decay" and have no memory in the others. layernorm: in gated cells. widths, hidden, repr_dim: channels of the
    convolutions, of fc7 and of fc8. trainable: whether the decay is learnt. Raises ValueError for other names.
    """
    if cell not in CELL_NAMES:
        raise ValueError(f"cell is {cell!r}; expected one of {', '.join(CELL_NAMES)}")
    if len(widths) < 2:
        raise ValueError(f"widths is {list(widths)}; expected the channels of two or more convolutions")
    count = len(widths)
    decays = cell == "time_decay"
    memory: dict[str, Any] = {"name": CELL_NAMES[cell]}
    if decays:
        memory |= {"tau": 0, "trainable": trainable}
    relu = {"name": "ActivationLayer", "activation": "ReLU"}
    nodes: list[dict[str, Any]] = []
    for i, width in enumerate(widths, 1):
        gates = {"out_channels": width, "ksize": [2, 2], "layernorm": layernorm}
        padding = "valid" if i == 1 else "same"
        nodes.append(
            {
                "name": f"conv{i}",
                "shape_from": None if i == 1 else f"conv{i - 1}",
                "harbor_policy": {"name": "ResizeConcat"},
                "pre_memory": {
                    "name": "Conv2dCell", "out_channels": width, "ksize": [2, 2], "padding": padding, "bias": 0.0,
                },
                "recurrent_cell": memory if decays or cell == "identity" else memory | gates,
                "post_memory": relu,
                "out_channels": width,
            }
        )  # fmt: skip
    for name, source, width in (
        (f"fc{count + 1}", f"conv{count}", hidden),
        (f"fc{count + 2}", f"fc{count + 1}", repr_dim),
    ):
        nodes.append(
            {
                "name": name,
                "shape_from": source,
                "harbor_policy": {"name": "ResizeConcat" if source.startswith("conv") else "Identity"},
                "pre_memory": {"name": "FullyConnected", "out_channels": width, "bias": 0.1, "activation": None},
                "recurrent_cell": memory if decays else {"name": "IdentityCell"},
                "post_memory": relu,
                "out_channels": width,
            }
        )
    pairs = [(a, b) for a, b in (*FORWARD, *FEEDBACK) if max(a, b) <= count]
    edges = [(f"conv{a}", f"conv{b}") for a, b in pairs]
    edges += [(f"conv{i}", f"fc{count + 1}") for i in dict.fromkeys((count, *SKIPS)) if i <= count]
    edges.append((f"fc{count + 1}", f"fc{count + 2}"))
    return {
        "nodes": nodes,
        "edges": [{"from": a, "to": b} for a, b in edges],
        "input_nodes": ["conv1"],
        "output_node": f"fc{count + 2}",
    }


def with_output_width(graph: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The graph with another number of features at its output node, as the original overrides it: in what follows the
    cell if that has a width, else in what precedes it. Raises ValueError where neither has one."""
    nodes = []
    for node in graph.get("nodes", ()):
        if node["name"] != graph.get("output_node"):
            nodes.append(node)
            continue
        for part in ("post_memory", "pre_memory"):
            changed = _with_width(node[part], width)
            if changed is not None:
                nodes.append({**node, part: changed, "out_channels": width})
                break
        else:
            raise ValueError(f"the output node {node['name']!r} has no operation with out_channels to set to {width}")
    return {**graph, "nodes": nodes} if nodes else dict(graph)


def _with_width(operation: Mapping[str, Any], width: int) -> dict[str, Any] | None:
    if operation["name"] == "Sequential":
        *first, last = operation["list_of_func_kwargs"]
        if last["name"] != "FullyConnected":
            raise ValueError(f"the output node ends with {last['name']}; expected FullyConnected")
        return {**operation, "list_of_func_kwargs": [*first, {**last, "out_channels": width}]}
    return {**operation, "out_channels": width} if "out_channels" in operation else None
