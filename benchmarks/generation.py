"""DiMSUM: one evaluation of the network, and one guided image, against itself on the reference operators.

    uv run python benchmarks/generation.py --threads 1

The peer holds the same weights and is the same network as its original is written: tokens transposed, flipped and
windowed in memory before and after every mixer, wavelets as strided and transposed convolutions, the definition of each
operator in torch, and torch's own linear layers. The velocities of both are compared before anything is timed, timings
alternate, and the figure is the ratio of the shortest times. ``scan order``: the same network with tokens moved in
memory alone, to show what the order as an argument brings by itself.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import shortest
from torch import Tensor, nn

import zoo
import zoo_kernels
from zoo_generation.dimsum import blocks, flow, parts


def moved(scan: blocks.Scan, u: Tensor, c: Tensor) -> Tensor:
    """A gated mixer step with the tokens reordered in memory."""
    order = blocks.walk(scan.order, u)
    shift, scale, gate = (v.unsqueeze(1) for v in scan.adaLN_modulation(c))
    h = u if order is None else u[:, order]
    h = h.flip(1) if scan.reverse else h
    h = h + gate * scan.mixer(h * (1 + scale) + shift)
    h = h.flip(1) if scan.reverse else h
    return h if order is None else h[:, order.argsort()]


def transform(x: Tensor, filters: list[Tensor], back: bool) -> Tensor:
    """Two levels of the wavelet packets as convolutions of images."""
    b, n, c = x.shape
    g = int(n**0.5)
    order = [i % 4 * 4 + i // 4 for i in range(16)]
    if not back:
        image = x.transpose(1, 2).reshape(b, c, g, g)
        for _ in range(2):
            count = image.shape[1]
            image = torch.cat([F.conv2d(image, f.expand(count, 1, 2, 2), stride=2, groups=count) for f in filters], 1)
        image = torch.cat([(image / 4).chunk(16, 1)[i] for i in order], 1)
        return image.view(b, c, 4, 4, g // 4, g // 4).permute(0, 4, 2, 5, 3, 1).reshape(b, n, c)
    image = (x * 4).view(b, g // 4, 4, g // 4, 4, c).permute(0, 5, 2, 4, 1, 3).reshape(b, 16 * c, g // 4, g // 4)
    image = torch.cat([image.chunk(16, 1)[i] for i in order], 1)
    for _ in range(2):
        h, w = image.shape[2:]
        image = image.view(b, 4, -1, h, w).transpose(1, 2)
        count = image.shape[1]
        image = F.conv_transpose2d(
            image.reshape(b, -1, h, w), filters[0].repeat(count, 1, 1, 1), stride=2, groups=count
        )
    return image.flatten(2).transpose(1, 2)


def literal(model: nn.Module) -> nn.Module:
    """The same network and weights, its scans as the original has them."""
    for module in model.modules():
        if isinstance(module, blocks.WaveletScan):

            def wavelets(u: Tensor, c: Tensor, scan: blocks.WaveletScan = module) -> Tensor:
                filters = [getattr(scan.dwt, f"w_{band}") for band in parts.BANDS]
                return transform(moved(scan, transform(u, filters, False), c), [scan.idwt.filters], True)  # type: ignore[list-item]

            module.forward = wavelets  # type: ignore[method-assign]
        elif isinstance(module, blocks.Scan):
            module.forward = lambda u, c, scan=module: moved(scan, u, c)  # type: ignore[method-assign, misc]
    return model


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="dimsum_l2")
    parser.add_argument("--depth", type=int, default=4, help="blocks: a cycle of scan orders and the attention block")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    for name, more in ((arguments.model, {"depth": arguments.depth}), ("dimsum_micro", {})):
        torch.manual_seed(0)
        ours = zoo.create(name, zero_init=False, **more).eval()
        peer = literal(zoo.create(name, zero_init=False, **more)).eval()
        peer.load_state_dict(ours.state_dict())
        x = torch.randn(2, ours.in_channels, ours.img_resolution, ours.img_resolution)
        t, y = torch.tensor([0.3, 0.3]), torch.tensor([1, ours.y_embedder.null])

        def reference(peer: nn.Module = peer, x: Tensor = x, t: Tensor = t, y: Tensor = y) -> Tensor:
            with zoo_kernels.backend("reference"):
                return flow.guided(peer, x, t, y, 4.0)

        calls: dict[str, Callable[[], object]] = {
            "zoo": functools.partial(flow.guided, ours, x, t, y, 4.0),
            "scan order": functools.partial(flow.guided, peer, x, t, y, 4.0),
            "reference": reference,
        }
        wanted = calls["zoo"]()
        for other in ("scan order", "reference"):
            torch.testing.assert_close(calls[other](), wanted, rtol=1e-3, atol=1e-3)
        times = shortest(calls, arguments.repeat)
        print(
            f"{name:14} {len(ours.blocks)} blocks, one guided evaluation, {arguments.threads} threads, float32: "
            f"{times['zoo'] * 1e3:.1f} ms, {times['reference'] / times['zoo']:.2f} times the reference, "
            f"{times['scan order'] / times['zoo']:.2f} times tokens moved in memory"
        )


if __name__ == "__main__":
    main()
