"""Recordings a second: ConvRNNs of touch against the plain loop over nodes and time steps, with torch's convolutions.

    uv run python benchmarks/touch.py --threads 1

The loop is the original's order of computing (every node at every step) with torch's own modules for the products, and
the same network behind the encoder. Both hold the same weights, their logits are compared before anything is timed, and
timings of the two alternate; the figure is the ratio of the shortest times.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch
from torch import Tensor, nn

import zoo
import zoo_kernels
from zoo_neuro.tactile.convolution import Conv2d, Part
from zoo_neuro.tactile.graph import TemporalGraph

NAMES = ("tactile_zhuang", "tactile_zhuang_gpt", "tactile_zhuang_intersectionrnn_ln_gpt")


def torch_parts(layer: Conv2d, x: Tensor, widths: tuple[int, ...] | None = None) -> list[Part]:
    """The convolution as torch's."""
    pieces = layer.weight.split(widths, 1) if widths else (layer.weight,)
    return [Part(layer, w, None if i else layer.bias) for i, w in enumerate(pieces)]


def loop(graph: TemporalGraph, x: Tensor) -> Tensor:
    """Every node at every time step, from what its sources made one step before."""
    wiring, found = graph.wiring, []
    made: dict[str, Tensor] = {n: x.new_zeros(x.shape[0], *graph.shapes[n]) for n in wiring.names}
    states: dict[str, Tensor | None] = dict.fromkeys(wiring.names)
    for t in range(x.shape[1]):
        new = {}
        for name in wiring.order:
            inputs = [x[:, t]] if name in wiring.inputs else []
            inputs += [made[source] for source in wiring.reads[name]]
            new[name], states[name] = graph.nodes[name](inputs, states[name], t)
        made = new
        found.append(made[wiring.output])
    return torch.stack(found, 1)


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The whole network, with all time steps of every part and torch's own modules."""
    with zoo_kernels.backend("reference"), mock.patch.object(Conv2d, "parts", torch_parts):
        y = loop(model.encoder.graph, x)
        if model.attends:
            y = model.attender(y)
        return model.head(model.decoder(y[:, -1:]))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--models", nargs="*", default=NAMES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, float32, 22 time steps")
    for name in arguments.models:
        model = zoo.create(name).eval()
        for batch in arguments.batch:
            x = torch.randn(batch, 22, 30, 5, 7)
            functions = {"zoo": lambda m=model, x=x: m(x), "loop": lambda m=model, x=x: plain(m, x)}
            torch.testing.assert_close(functions["zoo"](), functions["loop"](), rtol=1e-3, atol=1e-4)
            shortest = {key: float("inf") for key in functions}
            for _ in range(arguments.repeat):
                for key, function in functions.items():
                    began = time.perf_counter()
                    function()
                    shortest[key] = min(shortest[key], time.perf_counter() - began)
            rate, gain = batch / shortest["zoo"], shortest["loop"] / shortest["zoo"]
            print(
                f"{name:40} {batch:2} at a time: {rate:6.1f} recordings a second, {gain:.1f} times the loop", flush=True
            )


if __name__ == "__main__":
    main()
