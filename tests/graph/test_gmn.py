"""GMN: tokens, their order, what a sequence sees, and the equalities that the paper's recipe implies."""

import pytest
import torch

from zoo_graph.gmn import GMN, BidirectionalMamba
from zoo_graph.segments import graph_of
from zoo_graph.tokens import Neighbours, tokenise

from .test_graph_mamba import NODES, SIZES, edges, features


def hops(edge_index, nodes):
    """Shortest distances, (nodes, nodes)."""
    near = torch.eye(nodes)
    found = torch.full((nodes, nodes), nodes)
    a = torch.zeros(nodes, nodes)
    a[edge_index[0], edge_index[1]] = 1
    for k in range(nodes):
        found[(near > 0) & (found == nodes)] = k
        near = near @ a
    return found


def test_tokens_lie_in_their_balls():
    edge_index, m, s = edges(), 3, 2
    tokens = tokenise(edge_index, NODES, m, s, 4, torch.Generator().manual_seed(0))
    length = m * s + 1
    assert tokens.token.unique().tolist() == list(range(NODES * length))  # m * s + 1 tokens a node, none empty
    distance = hops(edge_index, NODES)
    home, position = tokens.token // length, tokens.token % length
    hop = torch.where(position == length - 1, 0, m - position // s)
    assert (distance[home, tokens.node] <= hop).all()
    for v in range(NODES):
        own = tokens.node[home == v]
        assert v in own.tolist()
        assert tokens.node[tokens.token == v * length + length - 1].tolist() == [v]  # the last token is the node
        for p in range(length):
            assert v in tokens.node[tokens.token == v * length + p].tolist()  # every walk begins at it


def test_edges_are_those_of_the_induced_subgraphs():
    edge_index = edges()
    tokens = tokenise(edge_index, NODES, 2, 1, 3, torch.Generator().manual_seed(0))
    found = sorted((int(tokens.token[a]), int(e)) for a, e in zip(tokens.edges[0], tokens.edge, strict=True))
    assert (tokens.token[tokens.edges[0]] == tokens.token[tokens.edges[1]]).all()
    assert (tokens.node[tokens.edges[0]] == edge_index[0, tokens.edge]).all()
    assert (tokens.node[tokens.edges[1]] == edge_index[1, tokens.edge]).all()
    expected = []
    for t in range(NODES * 3):
        inside = set(tokens.node[tokens.token == t].tolist())
        expected += [(t, e) for e, (a, b) in enumerate(edge_index.T.tolist()) if a in inside and b in inside]
    assert found == sorted(expected)


def test_walks_are_fair_and_repeat_with_their_seed():
    star = torch.tensor([[0, 0, 0, 1, 2, 3], [1, 2, 3, 0, 0, 0]])
    around = Neighbours.of(star, 5)
    reached = around.step(torch.zeros(30000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert (torch.bincount(reached, minlength=5)[1:4] / 30000 - 1 / 3).abs().max() < 0.015
    assert around.step(torch.tensor([4]), None).tolist() == [4]  # no neighbours: it stays
    alone = tokenise(torch.zeros(2, 0, dtype=torch.long), 2, 2, 1, 2)
    assert alone.node.tolist() == [0, 0, 0, 1, 1, 1]
    one, two = (tokenise(star, 5, 2, 2, 2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(ValueError, match="walks is 0"):
        tokenise(star, 5, 1, 1, 0)


def test_relabelling_with_the_walks_relabelled():
    torch.manual_seed(0)
    model = GMN(node_dim=16, out_dim=3, dim_h=16, layers=1, level="node", m=2, mpnn=True).eval()
    edge_index, x = edges(), features()
    tokens = tokenise(edge_index, NODES, 2, 2, 4, torch.Generator().manual_seed(0))
    whole = model(x, edge_index, node=tokens.node, token=tokens.token, edges=tokens.edges)
    p = torch.randperm(NODES)
    inverse, length = p.argsort(), model.positions
    token = inverse[tokens.token // length] * length + tokens.token % length
    other = model(x[p], inverse[edge_index], node=inverse[tokens.node], token=token, edges=tokens.edges)
    torch.testing.assert_close(other, whole[p], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{"m": 2}, {"m": 2, "local_layers": 0}, {"m": 0, "local_layers": 0, "mpnn": True}])
@pytest.mark.parametrize("level", ["node", "graph"])
def test_graphs_do_not_mix(more, level):
    """A graph's answer does not depend on the features of the others in its batch."""
    torch.manual_seed(0)
    model = GMN(node_dim=16, out_dim=3, dim_h=16, layers=2, level=level, **more).eval()
    edge_index, x = edges(), features()
    other = x.clone()
    other[: int(SIZES[0])] += 1
    before, after = (model(v, edge_index, sizes=SIZES) for v in (x, other))
    rows = graph_of(SIZES, NODES) > 0 if level == "node" else torch.tensor([False, True, True])
    torch.testing.assert_close(before[rows], after[rows])
    assert not torch.allclose(before[~rows], after[~rows])


def test_node_sequences_are_those_of_each_graph_alone():
    torch.manual_seed(0)
    model = GMN(node_dim=16, out_dim=3, dim_h=16, layers=2, level="node", m=0, local_layers=0).eval()
    edge_index, x = edges(), features()
    whole = model(x, edge_index, sizes=SIZES)
    start = 0
    for size in SIZES.tolist():
        own = (edge_index[0] >= start) & (edge_index[0] < start + size)
        alone = model(x[start : start + size], edge_index[:, own] - start)
        torch.testing.assert_close(whole[start : start + size], alone, rtol=1e-4, atol=1e-5)
        start += size


def test_both_directions_reach_every_node():
    """With m = 0 the first node in the order feels the last and the other way round."""
    torch.manual_seed(0)
    model = GMN(node_dim=4, out_dim=2, dim_h=16, layers=1, level="node", m=0, local_layers=0).eval()
    path = torch.stack([torch.arange(9), torch.arange(1, 10)])
    edge_index = torch.cat([path, path.flip(0)], 1)
    x = torch.randn(10, 4, requires_grad=True)
    for node in (0, 9):
        gradient = torch.autograd.grad(model(x, edge_index)[node].sum(), x)[0]
        assert gradient.abs().sum(1).min() > 0


def test_block_is_two_mixers():
    torch.manual_seed(0)
    block = BidirectionalMamba(8)
    x = torch.randn(2, 5, 8)
    p = block.norm(x)
    expected = x + block.out(block.forwards(p) + block.backwards(p.flip(1)).flip(1))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(block.last(x), expected[:, -1], rtol=1e-4, atol=1e-6)


def test_walks_are_fixed_in_evaluation_and_new_in_training():
    torch.manual_seed(0)
    model = GMN(node_dim=16, out_dim=3, dim_h=16, layers=1, level="node", m=2, local_layers=0)
    edge_index, x = edges(), features()
    model.eval()
    assert torch.equal(model(x, edge_index), model(x, edge_index))
    model.train()
    assert not torch.equal(model(x, edge_index), model(x, edge_index))


def test_edge_features_reach_the_tokens():
    torch.manual_seed(0)
    model = GMN(node_dim=16, edge_dim=2, out_dim=3, dim_h=16, layers=1, level="node", m=2).eval()
    edge_index, x = edges(), features()
    e = torch.randn(edge_index.shape[1], 2)
    assert not torch.allclose(model(x, edge_index, e), model(x, edge_index, e + 1))
    drawn = tokenise(edge_index, x.shape[0], m=2, samples=2, walks=4)
    given = {"node": drawn.node, "token": drawn.token, "edges": drawn.edges}
    assert model(x, edge_index, e, **given, edge=drawn.edge).isfinite().all()
    with pytest.raises(ValueError, match="given without edge"):
        model(x, edge_index, e, **given)


def test_bad_arguments():
    with pytest.raises(ValueError, match="m is -1"):
        GMN(m=-1)
    with pytest.raises(ValueError, match="m=0 has none"):
        GMN(m=0, local_layers=1)
