"""EEGDM: its convolution, a denoising step, a training step and a window's class, against the original's formulation.

    uv run python benchmarks/eeg.py --threads 1

The original computes each kernel anew at every call, as the product of C dB with all powers of all modes (the naive
Vandermonde product, its path without pykeops or CUDA), and convolves by transforms of twice the length of kernels and
signals, in plain torch. The same networks and weights run with both layers; their outputs are compared before anything
is timed, timings alternate, and the figure is the ratio of the shortest times. The model has published size.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from timing import shortest
from torch import Tensor

import zoo
from zoo.layers import FFTConv
from zoo_neuro.eegdm.diffusion import diffusion_loss


def as_the_original(self: FFTConv, x: Tensor, *, state: None = None, rate: float = 1.0) -> Tensor:
    """Zero-order hold, naive Vandermonde product, transforms of 2 L points; both directions in one kernel."""
    x, length = x.transpose(1, 2), x.shape[1]
    kernel = self.kernel
    dt = torch.exp(kernel.inv_dt) * rate
    A = torch.complex(-torch.exp(kernel.A_real), -kernel.A_imag)
    B, C = torch.view_as_complex(kernel.B), torch.view_as_complex(kernel.C)
    dtA = dt * A
    powers = torch.exp(dtA.unsqueeze(-1) * torch.arange(length, device=x.device))
    weights = B * C * (torch.exp(dtA) - 1) / A
    K = 2 * torch.einsum("chn,hnl->chl", weights, powers).real
    forward, back = K
    k = F.pad(forward, (0, length)) + F.pad(back.flip(-1), (length, 0))
    y = torch.fft.irfft(torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(k, n=2 * length), n=2 * length)[..., :length]
    return (y + x * self.D[0].unsqueeze(-1)).transpose(1, 2)


@contextlib.contextmanager
def original() -> Iterator[None]:
    with mock.patch.object(FFTConv, "forward", as_the_original):
        yield


def compare(what: str, run: Callable[[], Tensor], repeat: int) -> None:
    def theirs() -> Tensor:
        with original():
            return run()

    torch.testing.assert_close(run(), theirs(), rtol=1e-3, atol=1e-3)
    times = shortest({"zoo": run, "original": theirs}, repeat)
    ratio = times["original"] / times["zoo"]
    print(f"{what:44} {1e3 * times['zoo']:8.1f} ms, the original's takes {ratio:.1f} times as long", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    repeat = arguments.repeat
    print(f"{arguments.threads} threads, float32, torch {torch.__version__}; channels of 1000 samples")

    backbone = zoo.create("eegdm_backbone_base", zero_init=False).eval()
    layer, u = backbone.layers[0].layer, torch.randn(22, 1000, 256)
    with torch.no_grad():
        compare("one S4D layer, 22 channels, inference", lambda: layer(u), repeat)

    def trained() -> Tensor:
        layer.zero_grad()
        loss = layer(u).square().mean()
        loss.backward()
        return loss.detach()

    layer.train()
    compare("one S4D layer, 22 channels, with gradients", trained, repeat)
    layer.eval()

    x, t, cond = torch.randn(1, 1, 1000), torch.tensor([[7]]), torch.tensor([[3]])
    with torch.no_grad():
        compare("a denoising step of one channel", lambda: backbone(x, t, cond), repeat)
    noise = torch.randn(4, 1, 1000)
    many = torch.full((4, 1), 9), torch.arange(4)[:, None]

    def step() -> Tensor:
        backbone.zero_grad()
        loss = diffusion_loss(backbone, backbone.schedule, 0.5 * noise, many[1], noise=noise, t=many[0])
        loss.backward()
        return loss.detach()

    backbone.train()
    compare("a training step, 4 channels", step, max(repeat // 2, 1))
    model = zoo.create("eegdm_classifier_tuev").eval()
    window = torch.randn(1, 22, 1000)
    with torch.no_grad():
        compare("the class of a window of 22 channels", lambda: model(window), max(repeat // 2, 1))


if __name__ == "__main__":
    main()
