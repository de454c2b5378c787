"""The graph's order of computing gives what the definition gives: every node, every step, one after the other."""

import pytest
import torch

from zoo_neuro.tactile.cells import CELLS, make_cell
from zoo_neuro.tactile.convolution import Conv2d
from zoo_neuro.tactile.graph import TemporalGraph
from zoo_neuro.tactile.published import CELL_NAMES, with_output_width, zhuang_graph

RELU = {"name": "ActivationLayer", "activation": "ReLU"}


def conv(name, source, width, cell="IdentityCell", pre=None, post=None, **more):
    gates = {} if cell in ("IdentityCell", "TimeDecayRecurrentCell") else {"ksize": [2, 2]}
    return {
        "name": name,
        "shape_from": source,
        "harbor_policy": {"name": "ResizeConcat"},
        "pre_memory": pre
        or {"name": "Conv2dCell", "out_channels": width, "ksize": 3, "padding": 1, "activation": "ELU"},
        "recurrent_cell": {"name": cell, **gates},
        "post_memory": post or RELU,
        "out_channels": width,
        **more,
    }


def flat(name, source, width, cell="IdentityCell", **pre):
    return {
        "name": name,
        "shape_from": source,
        "harbor_policy": {"name": "ResizeConcat"},
        "pre_memory": {"name": "FullyConnected", "out_channels": width, **pre},
        "recurrent_cell": {"name": cell},
        "post_memory": {"name": "Identity"},
        "out_channels": width,
    }


def described(nodes, edges, **more):
    return {
        "nodes": nodes,
        "edges": [{"from": a, "to": b} for a, b in edges],
        "input_nodes": [nodes[0]["name"]],
        "output_node": nodes[-1]["name"],
        **more,
    }


POOL = {"name": "MaxPool", "ksize": 2, "stride": 2, "ceil_mode": True}
MEAN = {"name": "AdaptiveAvgPool", "output_size": [1, 1], "flatten": True}
BLOCK = {
    "name": "ResidualAdd",
    "feedforward_func_kwargs": {"name": "Conv2dCell", "out_channels": 4, "ksize": 3, "padding": 1, "batchnorm": 4},
    "residual_func_kwargs": {"name": "Conv2dCell", "out_channels": 4, "ksize": 1},
    "activation": "ReLU",
}
GRAPHS = {
    **{f"zhuang {cell}": zhuang_graph(cell, widths=(4, 5, 6, 5), hidden=7, repr_dim=3) for cell in CELL_NAMES},
    "zhuang normed": zhuang_graph("lstm", True, widths=(4, 5, 6), hidden=7, repr_dim=3),
    "resized feedback": described(
        [
            conv("a", None, 4, "GRUCell", post={"name": "Sequential", "list_of_func_kwargs": [RELU, POOL]}),
            conv("b", "a", 5, "TimeDecayRecurrentCell"),
            flat("z", "b", 3, "TimeDecayRecurrentCell"),
        ],
        [("a", "b"), ("b", "a"), ("a", "z"), ("b", "z")],
    ),
    "memory behind a cycle, a skip and itself": described(
        [conv("a", None, 4, "UGRNNCell"), conv("b", "a", 4), conv("c", "b", 4, "LSTMCell"), flat("z", "c", 3)],
        [("a", "b"), ("b", "b"), ("b", "c"), ("a", "c"), ("c", "z")],
    ),
    "residual": described(
        [conv("a", None, 4), conv("b", "a", 4, "TimeDecayRecurrentCell", post=BLOCK, residual=True), flat("z", "b", 3)],
        [("a", "b"), ("b", "z"), ("z", "z")][:2],
    ),
    "norms of each step": described(
        [
            conv("a", None, 4, pre={"name": "Conv2dCell", "out_channels": 4, "ksize": 2, "batchnorm": 4,
                                    "batchnorm_timevary": True}),
            flat("z", "a", 3, batchnorm=3, batchnorm_timevary=True, activation=None),
        ],
        [("a", "z")],
    ),
    "no cycle, averages": described(
        [
            conv("a", None, 4),
            conv("m", "a", 4, "ConvRNNBasicCell", post=MEAN),
            flat("z", "m", 3),
        ],
        [("a", "m"), ("m", "z")],
    ),
}  # fmt: skip
GRAPHS["no cycle, averages"]["nodes"][1]["recurrent_cell"] |= {"ksize": 1}


def build(name, full_unroll=False, steps=6, **more):
    torch.manual_seed(0)
    graph = TemporalGraph(GRAPHS[name], (3, 5, 7), steps, full_unroll, **more)
    with torch.no_grad():
        for parameter in graph.parameters():
            if parameter.dim() < 2:
                parameter.uniform_(-0.6, 0.6)  # decays, too
        for buffer in graph.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return graph.eval()


def plainly(graph, x):
    """The definition: at every step every node reads what its sources made before it, by the order, or a step ago."""
    wiring, made, states, found = graph.wiring, {}, {}, []
    for t in range(x.shape[1]):
        new = {}
        for name in wiring.order:
            inputs = [x[:, t]] if name in wiring.inputs else []
            for source in wiring.reads[name]:
                now = wiring.delay[source, name] == 0
                zeros = x.new_zeros(x.shape[0], *graph.shapes[source])
                inputs.append(new[source] if now else made.get(source, zeros))
            new[name], states[name] = graph.nodes[name](inputs, states.get(name), t)
        made = new
        found.append(dict(made))
    return found


@pytest.mark.parametrize("full_unroll", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_order_of_computing(name, full_unroll):
    graph = build(name, full_unroll)
    x = torch.randn(3, 6, 3, 5, 7)
    with torch.no_grad():
        expected = plainly(graph, x)
        output = torch.stack([e[graph.wiring.output] for e in expected], 1)
        torch.testing.assert_close(graph(x), output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(graph(x, [5, 2]), output[:, [5, 2]], rtol=1e-4, atol=1e-5)
        activations = {}
        graph(x, [1], activations)
        for t, nodes in enumerate(expected):
            for node, value in nodes.items():
                torch.testing.assert_close(activations[t][node], value, rtol=1e-4, atol=1e-5)
        state, steps = graph.init_state(3), []
        for t in range(6):
            steps.append(graph.step(x[:, t], state))
        torch.testing.assert_close(torch.stack(steps, 1), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["zhuang gru", "residual", "norms of each step"])
def test_gradients_and_running_statistics(name):
    """In training, too: the same gradients, and BatchNorm counts the steps as they come."""
    x = torch.randn(3, 6, 3, 5, 7)
    first, second = build(name).train(), build(name).train()
    first(x).square().sum().backward()
    output = torch.stack([e[second.wiring.output] for e in plainly(second, x)], 1)
    output.square().sum().backward()
    for (key, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=key)
    for (key, a), b in zip(first.named_buffers(), second.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=key)


def test_only_what_is_needed_is_computed():
    graph = build("zhuang gru", steps=22)
    need = graph.needed(22, [21])
    assert need["fc6"] == [21]
    assert need["fc5"] == [20]
    assert need["conv4"] == list(range(20))
    assert need["conv3"] == list(range(19))
    assert graph.wiring.groups == [["conv1"], ["conv2", "conv3", "conv4"], ["fc5"], ["fc6"]]
    # in order within a step, all but feedback arrives at once
    assert build("zhuang gru", True, steps=22).needed(22, [21])["conv4"] == list(range(22))


def test_a_still_picture_and_the_last_step():
    graph = build("zhuang ugrnn", return_all=False)
    x = torch.randn(2, 3, 5, 7)
    whole = build("zhuang ugrnn")
    torch.testing.assert_close(graph(x), whole(x[:, None].expand(-1, 6, -1, -1, -1))[:, -1])


def test_orders():
    """Without ff_order: the first longest path, with what is not on it put in before the first node that it feeds."""
    nodes = [conv(n, None if n == "a" else "a", 4) for n in "abcd"] + [flat("z", "d", 3)]
    edges = [("a", "b"), ("b", "c"), ("c", "z"), ("c", "b"), ("a", "d"), ("d", "z")]
    assert TemporalGraph(described(nodes, edges), (3, 5, 7), 2).wiring.order == ["a", "b", "c", "d", "z"]
    edges[4] = ("b", "d")
    assert TemporalGraph(described(nodes, edges), (3, 5, 7), 2).wiring.order == ["a", "b", "c", "d", "z"]
    given = ["a", "d", "c", "b", "z"]
    graph = TemporalGraph(described(nodes, edges, ff_order=given), (3, 5, 7), 2, full_unroll=True)
    assert graph.wiring.order == given
    assert graph.wiring.delay["c", "b"] == 0
    assert graph.wiring.delay["b", "c"] == 1


def test_mistakes_are_named():
    good = GRAPHS["zhuang ugrnn"]
    with pytest.raises(ValueError, match="has no 'edges'; it has nodes, input_nodes, output_node"):
        TemporalGraph({k: v for k, v in good.items() if k != "edges"}, (3, 5, 7), 4)
    for change, message in (
        ({"output_node": "fc9"}, "no node 'fc9'"),
        ({"edges": good["edges"][:-1]}, "nodes and edges of the graph do not match: fc6"),
        ({"ff_order": ["conv1"]}, r"ff_order is \['conv1'\]"),
        ({"input_nodes": ["fc5"]}, "no input reaches the nodes conv1"),
    ):
        with pytest.raises(ValueError, match=message):
            TemporalGraph({**good, **change}, (3, 5, 7), 4)
    for node, message in (
        ({"out_channels": 5}, "out_channels is 5, its operations give 4"),
        ({"recurrent_cell": {"name": "Elman"}}, "recurrent cell is 'Elman'"),
        ({"recurrent_cell": {"name": "GRUCell", "ksize": 2, "groups": 2}}, "groups is 2"),
        ({"recurrent_cell": {"name": "GRUCell", "ksize": 2, "peephole": True}}, "no argument 'peephole'"),
        ({"pre_memory": {"name": "Fold"}}, "operation is 'Fold'"),
        ({"harbor_policy": {"name": "Sum"}}, "expected the name ResizeConcat or Identity"),
    ):
        nodes = [{**good["nodes"][0], **node}, *good["nodes"][1:]]
        with pytest.raises(ValueError, match=message):
            TemporalGraph({**good, "nodes": nodes}, (3, 5, 7), 4)
    with pytest.raises(ValueError, match="cell is 'elman'"):
        zhuang_graph("elman")
    graph = build("norms of each step")
    with pytest.raises(ValueError, match="step 6, but BatchNorm has 6 sets"):
        graph(torch.zeros(2, 7, 3, 5, 7))
    with pytest.raises(ValueError, match=r"x has shape \(2, 7, 3, 5, 6\)"):
        graph(torch.zeros(2, 7, 3, 5, 6))


def test_output_width():
    graph = with_output_width(GRAPHS["resized feedback"], 9)
    assert TemporalGraph(graph, (3, 5, 7), 2).out_features == 9
    last = {**graph["nodes"][-1], "pre_memory": {"name": "Identity"}}
    with pytest.raises(ValueError, match="no operation with out_channels"):
        with_output_width({**graph, "nodes": [*graph["nodes"][:-1], last]}, 4)


@pytest.mark.parametrize("name", [n for n in CELLS if n != "IdentityCell"])
def test_cells_by_series_and_by_steps(name):
    torch.manual_seed(0)
    options = {} if name == "TimeDecayRecurrentCell" else {"ksize": 1 if name == "ConvRNNBasicCell" else [2, 2]}
    cell = make_cell({"name": name, **options}, 4)
    x = torch.randn(3, 5, 4, 4, 6)
    state, made = None, []
    for t in range(5):
        y, state = cell(x[:, t], state)
        made.append(y)
    torch.testing.assert_close(cell.series(x.flatten(0, 1), 5).unflatten(0, (3, 5)), torch.stack(made, 1))


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1}, {"padding": "valid"}, {"stride": 2}])
def test_convolution_of_parts(options):
    """Rows of neighbours times weights are the convolution, and parts of the channels add up."""
    layer = Conv2d(7, 6, (2, 3), **options)
    x = torch.randn(2, 7, 4, 6)
    expected = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, layer.margins), layer.weight, layer.bias, layer.stride
    )
    assert expected.shape[2:] == layer.out_size((4, 6))
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        first, second = layer.parts(x, (3, 4))
        torch.testing.assert_close(second(x[:, 3:], add=first(x[:, :3])), expected)
        layer.weight.mul_(2)  # what was kept of the old weights is not used again
        torch.testing.assert_close(layer(x) - layer.bias[:, None, None], 2 * (expected - layer.bias[:, None, None]))
