"""Graph-Mamba's layers along one ragged list of nodes against the padded form that the original runs.

    uv run python benchmarks/graph.py --threads 1

The padded form orders the nodes of each graph, pads every graph to the largest and calls the mixer once for each of the
five orders of an evaluation. It runs on the same kernels ("padded") and on the reference operators, the definition of
each operator in torch ("padded, reference"). All hold the same weights and orders; outputs are compared before anything
is timed, and timings alternate; figures are ratios of the shortest times.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from timing import shortest
from torch import Tensor

import zoo_kernels
from zoo.layers import Mamba
from zoo_graph.graph_mamba import GPSLayers
from zoo_graph.segments import graph_of


def graphs(count: int, smallest: int, largest: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(edge_index, sizes): rings with chords, their sizes spread as a power law."""
    r = np.random.default_rng(seed)
    share = r.random(count) ** 3
    sizes = (smallest + share * (largest - smallest)).astype(int)
    parts, start = [], 0
    for n in sizes.tolist():
        ring = np.stack([np.arange(n), np.roll(np.arange(n), -1)])
        chords = r.integers(0, n, (2, n // 4))
        both = np.concatenate([ring, chords], 1) + start
        parts += [both, both[::-1]]
        start += n
    return torch.from_numpy(np.concatenate(parts, 1)), torch.from_numpy(sizes)


def padded(model: GPSLayers, x: Tensor, edge_index: Tensor, e: Tensor, sizes: Tensor, noise: Tensor) -> Tensor:
    """The stack with every mixer called on padded sequences, once an order."""
    graph, count = graph_of(sizes, len(x)), len(sizes)
    place = torch.arange(len(x)) - (sizes.cumsum(0) - sizes)[graph]
    for layer, own in zip(model.layers, noise, strict=True):
        orders, _ = layer.draw(edge_index, graph, own.shape[0], own, None)

        def mixer(h: Tensor, orders: Tensor = orders, layer=layer) -> Tensor:
            total = torch.zeros_like(h)
            for order in orders:
                dense = h.new_zeros(count, int(sizes.max()), h.shape[1])
                dense[graph[order], place] = h[order]
                y = Mamba.forward(layer.self_attn, dense)[graph[order], place]
                total[order] += y
            return total / len(orders)

        local, e = layer.local_model(x, edge_index, e)
        h = layer.norm1_local(local) + layer.norm1_attn(x + mixer(x))
        x = layer.norm2(h + layer.ff_linear2(layer.ff_linear1(h).relu()))
    return x


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for count, smallest, largest in ((32, 20, 400), (1, 4000, 4001)):
        edge_index, sizes = graphs(count, smallest, largest)
        nodes = int(sizes.sum())
        model = GPSLayers(4, 96).eval()
        x, e, noise = torch.randn(nodes, 96), torch.randn(edge_index.shape[1], 96), torch.rand(4, 5, nodes)

        def ragged(model=model, x=x, edge_index=edge_index, e=e, sizes=sizes, noise=noise) -> Tensor:
            return model(x, edge_index, e, sizes, noise=noise)[0]

        def same_kernels(model=model, x=x, edge_index=edge_index, e=e, sizes=sizes, noise=noise) -> Tensor:
            return padded(model, x, edge_index, e, sizes, noise)

        def reference(run=same_kernels) -> Tensor:
            with zoo_kernels.backend("reference"):
                return run()

        torch.testing.assert_close(same_kernels(), ragged(), rtol=1e-3, atol=1e-3)
        times = shortest({"ragged": ragged, "padded": same_kernels, "reference": reference}, arguments.repeat)
        print(
            f"{count} graphs of {int(sizes.min())} to {int(sizes.max())} nodes, {nodes} in all, 4 layers of 96: "
            f"{nodes / times['ragged']:.0f} nodes a second; padded {times['padded'] / times['ragged']:.1f}, padded on "
            f"the reference operators {times['reference'] / times['ragged']:.1f} times as long"
        )


if __name__ == "__main__":
    main()
