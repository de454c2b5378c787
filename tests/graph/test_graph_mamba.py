"""Graph-Mamba: orders, buckets, ragged batches, relabelled nodes, and the padded form that the original runs."""

import pytest
import torch

import zoo
import zoo_kernels
from zoo.layers import Mamba
from zoo_graph.graph_mamba import BUCKETS, ORDERS, GPSLayer, GPSLayers, OrderedMamba, order_named
from zoo_graph.local_models import GAT, GINE, GENConv, GraphAttention
from zoo_graph.models import GraphMamba
from zoo_graph.segments import degree, graph_of, lexsort, segment_max, segment_mean, segment_sum, starts

SIZES = torch.tensor([7, 4, 9])
NODES = 20


def edges(seed=0, sizes=SIZES, count=14):
    """Random edges inside each graph, both directions."""
    g = torch.Generator().manual_seed(seed)
    found, start = [], 0
    for size in sizes.tolist():
        pair = torch.randint(0, size, (2, count), generator=g) + start
        found += [pair, pair.flip(0)]
        start += size
    return torch.cat(found, 1)


def features(seed=1, nodes=NODES, width=16):
    return torch.randn(nodes, width, generator=torch.Generator().manual_seed(seed))


def padded(mixer: Mamba, x, order, labels):
    """The original's way: every sequence by itself, zeros behind it."""
    y = torch.zeros_like(x)
    for label in labels.unique().tolist():
        own = order[labels[order] == label]
        padding = torch.zeros(1, 3, x.shape[1])
        y[own] = Mamba.forward(mixer, torch.cat([x[own][None], padding], 1))[0, : len(own)]
    return y


@pytest.mark.parametrize("name", ORDERS)
def test_ragged_scan_is_the_padded_one(name):
    torch.manual_seed(0)
    layer = GPSLayer(16, global_model_type=name).eval()
    edge_index, graph = edges(), graph_of(SIZES, NODES)
    draws = ORDERS[name].draws
    noise, bucket = torch.rand(draws, NODES), torch.randint(0, BUCKETS, (draws, NODES))
    order, resets = layer.draw(edge_index, graph, draws, noise, bucket)
    x = features()
    expected = []
    for i in range(draws):
        labels = graph.clone()
        if ORDERS[name].buckets == "index":
            labels = graph * BUCKETS + torch.arange(NODES) % BUCKETS
        elif ORDERS[name].buckets:
            labels = graph * BUCKETS + bucket[i]
        expected.append(padded(layer.self_attn, x, order[i], labels))
    found = layer.self_attn(x, order, resets)
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ORDERS)
def test_keys_rise_inside_every_sequence(name):
    layer = GPSLayer(16, global_model_type=name)
    edge_index, graph = edges(), graph_of(SIZES, NODES)
    kind = ORDERS[name]
    noise = torch.rand(kind.draws, NODES)
    order, resets = layer.draw(edge_index, graph, kind.draws, noise, None)
    key = degree(edge_index, NODES).expand(kind.draws, -1)
    key = {
        "input": torch.arange(NODES).expand(kind.draws, -1).float(),
        "random": noise,
        "noise": noise,
        "degree": key + noise if kind.ties == "noise" else key,
    }[kind.key]
    for i in range(kind.draws):
        assert sorted(order[i].tolist()) == list(range(NODES))
        along, new = key[i, order[i]], resets[i, order[i]]
        assert new[0]
        assert ((along[1:] >= along[:-1]) | new[1:]).all()
        assert (graph[order[i]].diff() >= 0).all()


def test_the_swapped_names():
    """ "Noise" has buckets and "Noise_Bucket" has none, as the original runs them."""
    assert ORDERS["Mamba_Hybrid_Noise"].buckets == "random"
    assert ORDERS["Mamba_Hybrid_Noise_Bucket"].buckets == ""


def test_names_that_cannot_run():
    for name, reason in (("Mamba_Eigen", "data of every node"), ("Mamba_2", "raises for every such suffix")):
        with pytest.raises(ValueError, match=reason):
            order_named(name)
    with pytest.raises(ValueError, match="'Mambo'"):
        order_named("Mambo")


@pytest.mark.parametrize(
    "norm", [{"batch_norm": True}, {"batch_norm": False, "layer_norm": True}, {"batch_norm": False}]
)
def test_graphs_do_not_mix(norm):
    """A graph in a batch is the graph alone."""
    torch.manual_seed(0)
    model = GPSLayers(2, 16, **norm).eval()
    edge_index, x = edges(), features()
    e = torch.randn(edge_index.shape[1], 16)
    noise = torch.rand(2, 5, NODES)
    whole, _ = model(x, edge_index, e, SIZES, noise=noise)
    start = 0
    for size in SIZES.tolist():
        rows = slice(start, start + size)
        own = (edge_index[0] >= start) & (edge_index[0] < start + size)
        alone, _ = model(x[rows], edge_index[:, own] - start, e[own], noise=noise[:, :, rows])
        torch.testing.assert_close(whole[rows], alone, rtol=1e-4, atol=1e-5)
        start += size


def test_relabelling_the_nodes_relabels_the_answer():
    """With noise that breaks every tie, an order does not depend on the nodes' numbers."""
    torch.manual_seed(0)
    model = GPSLayers(2, 16, global_model_type="Mamba_Hybrid_Degree_Noise").eval()
    edge_index, x = edges(sizes=torch.tensor([12]), count=20), features(nodes=12)
    e, noise = torch.randn(edge_index.shape[1], 16), torch.rand(2, 5, 12)
    p = torch.randperm(12)
    inverse = p.argsort()
    whole, _ = model(x, edge_index, e, noise=noise)
    other, _ = model(x[p], inverse[edge_index], e, noise=noise[:, :, p])
    torch.testing.assert_close(other, whole[p], rtol=1e-4, atol=1e-5)


def test_one_draw_in_training_and_five_outside():
    torch.manual_seed(0)
    layer = GPSLayer(16, batch_norm=False).eval()
    edge_index, x, graph = edges(), features(), graph_of(SIZES, NODES)
    e, noise = torch.randn(edge_index.shape[1], 16), torch.rand(5, NODES)
    args = (x, edge_index, e, graph, 3)
    five, _ = layer(*args, noise=noise)
    one, _ = layer(*args, train=True, noise=noise[:1])
    assert not torch.allclose(five, one)
    torch.testing.assert_close(layer(*args, noise=noise[:1].expand(5, -1))[0], one, rtol=1e-4, atol=1e-5)


def test_bad_layers():
    with pytest.raises(ValueError, match="layer_norm and batch_norm are both set"):
        GPSLayer(16, layer_norm=True, batch_norm=True)
    with pytest.raises(ValueError, match="local_gnn_type is 'PNA'"):
        GPSLayer(16, local_gnn_type="PNA")
    with pytest.raises(ValueError, match="'GAT' has no such form"):
        GPSLayer(16, local_gnn_type="GAT", equivstable_pe=True)
    with pytest.raises(ValueError, match="num_heads is 3"):
        GPSLayer(16, global_model_type="Transformer", num_heads=3)
    with pytest.raises(ValueError, match="both 'None'"):
        GPSLayer(16, local_gnn_type="None", global_model_type="None")


def test_attention_stays_inside_a_graph():
    torch.manual_seed(0)
    attention = GraphAttention(16, 4, 0.0).eval()
    x, graph = features(), graph_of(SIZES, NODES)
    found = attention(x, graph, 3)
    for i in range(3):
        own = x[graph == i][None]
        alone = torch.nn.MultiheadAttention.forward(attention, own, own, own)[0][0]
        torch.testing.assert_close(found[graph == i], alone, rtol=1e-4, atol=1e-5)


def test_local_models_by_their_sums():
    """Each node's new value from its neighbours one by one."""
    torch.manual_seed(0)
    edge_index, x = edges(), features()
    e = torch.randn(edge_index.shape[1], 16)
    gine, gen, gat = GINE(16), GENConv(16).eval(), GAT(16, 2)
    torch.nn.init.normal_(gat.bias)
    outputs = [model(x, edge_index, e) for model in (gine, gen, gat)]
    node = 5
    into = (edge_index[1] == node).nonzero()[:, 0]
    message = (x[edge_index[0, into]] + e[into]).relu()
    torch.testing.assert_close(outputs[0][node], gine.nn(x[node] + message.sum(0)))
    share = message.softmax(0)
    torch.testing.assert_close(
        outputs[1][node], gen.mlp((x[node] + (share * message).sum(0))[None])[0], atol=1e-5, rtol=1e-4
    )
    into = into[edge_index[0, into] != node]
    sources = torch.cat([edge_index[0, into], torch.tensor([node])])
    own = torch.cat([e[into], e[into].mean(0, keepdim=True)])
    h, edge = gat.lin(x).unflatten(1, (2, 8)), gat.lin_edge(own).unflatten(1, (2, 8))
    score = (h * gat.att_src).sum(-1)[sources] + (h * gat.att_dst).sum(-1)[node] + (edge * gat.att_edge).sum(-1)
    share = torch.nn.functional.leaky_relu(score, 0.2).softmax(0)
    expected = (share[..., None] * h[sources]).sum(0).flatten() + gat.bias
    torch.testing.assert_close(outputs[2][node], expected, atol=1e-5, rtol=1e-4)


def test_other_layer_types_make_models():
    for own in ({"local_gnn_type": "GAT"}, {"local_gnn_type": "GINE", "global_model_type": "Transformer"}):
        model = GraphMamba(node_dim=3, out_dim=2, dim_h=16, layers=1, **own)
        model(torch.randn(NODES, 3), edges(), None, SIZES).sum().backward()
        assert model.unused_parameters == ()


def test_adapter_and_other_configurations():
    """State dicts of every norm and branch come back under the original's keys."""
    adapter = zoo.reference("gmn")
    for more in (
        {"layer_norm": True, "batch_norm": False},
        {"batch_norm": False},
        {"global_model_type": "Mamba_Degree"},
        {"local_gnn_type": "None"},
        {"global_model_type": "None"},
        {"global_model_type": "Transformer"},
        {"local_gnn_type": "GINE"},
        {"local_gnn_type": "GENConv"},
        {"local_gnn_type": "GAT", "num_heads": 2},
        {"equivstable_pe": True},
    ):
        own = {"local_gnn_type": "CustomGatedGCN", "global_model_type": "Mamba", **more}
        model = GPSLayers(2, 16, **own)
        state = adapter.to_reference(model.state_dict(), model=model)
        assert all(key[0] in "01" for key in state)
        again = adapter.build({"layers": 2, "dim_h": 16, "num_heads": 4, **own}, state)
        inputs = {
            "x": features(),
            "edge_index": edges(),
            "edge_attr": torch.randn(84, 16),
            "batch": graph_of(SIZES, 20),
            "pe_EquivStableLapPE": torch.randn(20, 4),
        }
        found = adapter.run(again, inputs, call={"split": "val"})
        assert torch.isfinite(found["x"]).all()
    with pytest.raises(ValueError, match="weights edges by positional encodings"):
        GPSLayers(1, 16, equivstable_pe=True)(features(), edges(), torch.randn(84, 16), SIZES)
    with pytest.raises(ValueError, match="no argument 'width'"):
        adapter.build({"dim_h": 16, "width": 3}, {})


@pytest.mark.parametrize(("level", "rows"), [("node", NODES), ("graph", 3), ("link", 5)])
def test_heads(level, rows):
    torch.manual_seed(0)
    model = GraphMamba(node_dim=3, out_dim=4, dim_h=16, layers=1, level=level, pe_dim=2).eval()
    links = torch.randint(0, NODES, (2, 5)) if level == "link" else None
    given = (torch.randn(NODES, 3), edges(), None, SIZES, torch.randn(NODES, 2))
    assert model(*given, links).shape == (rows, 4)
    if links is not None:
        noise = torch.rand(1, 5, NODES)
        torch.testing.assert_close(model(*given, links, noise=noise), model(*given, links.flip(0), noise=noise))


def test_categories_and_missing_features():
    model = GraphMamba(node_categories=[3, 5], edge_categories=[2], out_dim=2, dim_h=8, layers=1).eval()
    edge_index = edges()
    x = torch.stack([torch.randint(0, 3, (NODES,)), torch.randint(0, 5, (NODES,))], 1)
    assert model(x, edge_index, torch.zeros(edge_index.shape[1], 1, dtype=torch.long)).shape == (1, 2)
    bare = GraphMamba(out_dim=2, dim_h=8, layers=1).eval()
    assert bare(None, edge_index, sizes=SIZES).shape == (3, 2)
    with pytest.raises(ValueError, match="node features are of shape"):
        model(x[:, :1], edge_index)
    with pytest.raises(ValueError, match="edge features are missing"):
        model(x, edge_index)
    with pytest.raises(ValueError, match="expected integers \\(2, edges\\)"):
        model(x, edge_index.T)
    with pytest.raises(ValueError, match="x and sizes are both missing"):
        bare(None, edge_index)
    with pytest.raises(ValueError, match="kind is 'guess'"):
        GraphMamba(kind="guess")
    with pytest.raises(ValueError, match="level is 'edge'"):
        GraphMamba(level="edge")
    with pytest.raises(ValueError, match="pooling is 'median'"):
        GraphMamba(pooling="median")


@pytest.mark.parametrize("backend", ["auto", "export"])
def test_segments(backend):
    values, segment = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([0, 0, 2])
    with zoo_kernels.backend(backend):
        assert segment_sum(values, segment, 4).flatten().tolist() == [3, 0, 6, 0]
        assert segment_mean(values, segment, 4).flatten().tolist() == [1.5, 0, 6, 0]
        assert segment_max(values, segment, 4).flatten().tolist() == [2, 0, 6, 0]
    assert graph_of(torch.tensor([2, 0, 1]), 3).tolist() == [0, 0, 2]
    order = lexsort([torch.tensor([3, 1, 2, 1]), torch.tensor([1, 1, 0, 0])])
    assert order.tolist() == [3, 2, 1, 0]
    assert starts(order, torch.tensor([1, 1, 0, 0])).tolist() == [False, True, False, True]
    assert starts(order, torch.tensor([1, 1, 0, 0]), reverse=True).tolist() == [True, False, True, False]


def test_the_mixer_is_mamba():
    """In the nodes' own order, one draw is the ordinary mixer."""
    torch.manual_seed(0)
    mixer = OrderedMamba(16, expand=1)
    x = features()
    resets = torch.zeros(1, NODES, dtype=torch.bool)
    torch.testing.assert_close(mixer(x, torch.arange(NODES)[None], resets), Mamba.forward(mixer, x[None])[0])
