"""The Mixture-of-Mamba block with one product a modality, against every expert on every token and then a choice.

    uv run python benchmarks/mixture_of_mamba.py --threads 1

All forms hold the same weights and run on the same kernels but for "reference", which is the second form on the
reference operators, the definition of each operator in torch. The dense block is the paper's baseline: a plain Mamba of
the size that is active. Outputs are compared before anything is timed, and timings alternate; figures are ratios of the
shortest times. Decoding: tokens through ``step`` against reading the text again for each token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import shortest
from torch import Tensor

import zoo_kernels
from zoo.layers import Mamba
from zoo.layers.linear import linear
from zoo_multimodal.mixture_lm import MixtureLM, generate
from zoo_multimodal.mixture_of_mamba import MixtureOfMamba
from zoo_multimodal.routing import RoutedLinear


class EveryExpert(MixtureOfMamba):
    """The same block; each projection runs all its experts on all tokens and keeps one result a token."""

    kinds: Tensor

    def forward(self, u: Tensor, modality: Any = None, **how: Any) -> Tensor:
        self.kinds = modality
        return super().forward(u, modality, **how)

    def _one_of_all(self, layer: RoutedLinear, x: Tensor) -> Tensor:
        every = [linear(x, e.weight, e.bias) for e in layer]
        y = every[0]
        for m in range(1, len(every)):
            y = torch.where((self.kinds == m)[..., None], every[m], y)
        return y

    def _project(self, name: str, x: Tensor, routing: Any) -> Tensor:
        return self._one_of_all(getattr(self, name), x)

    def _time_step(self, low: Tensor, routing: Any) -> tuple[Tensor, Tensor | None]:
        return self._one_of_all(self.dt_proj, low), None


def ratios(times: dict[str, float]) -> str:
    first, *rest = times
    return ", ".join(f"{name} {times[name] / times[first]:.2f}" for name in rest) + " times as long"


def blocks(width: int, modalities: int, tokens: int, batch: int, repeat: int) -> None:
    torch.manual_seed(0)
    routed = MixtureOfMamba(width, modalities)
    every = EveryExpert(width, modalities)
    every.load_state_dict(routed.state_dict())
    dense = Mamba(width)
    u = torch.randn(batch, tokens, width)
    kinds = (torch.arange(tokens) // 64 % modalities).expand(batch, -1).contiguous()  # runs of 64 tokens
    forms: dict[str, Callable[[], Tensor]] = {
        "routed": lambda: routed(u, kinds),
        "every expert": lambda: every(u, kinds),
        "dense": lambda: dense(u),
    }

    def reference() -> Tensor:
        with zoo_kernels.backend("reference"):
            return every(u, kinds)

    what = f"width {width}, {modalities} modalities, {batch} x {tokens} tokens"
    with torch.no_grad():
        torch.testing.assert_close(every(u, kinds), routed(u, kinds), rtol=1e-3, atol=1e-3)
        times = shortest(forms, repeat)
        slow = shortest({"routed": forms["routed"], "reference": reference}, 1)["reference"]
    print(
        f"{what}, inference: routed {times['routed'] * 1e3:.1f} ms; {ratios(times | {'reference': slow})}", flush=True
    )

    def learning(form: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: form().pow(2).mean().backward()

    times = shortest({name: learning(form) for name, form in forms.items()}, repeat)
    print(f"{what}, training: routed {times['routed'] * 1e3:.1f} ms; {ratios(times)}", flush=True)


@torch.no_grad()
def decoding(width: int, layers: int, read: int, write: int) -> None:
    torch.manual_seed(0)
    model = MixtureLM(width, layers, (1000, 500)).eval()
    text = torch.randint(0, 1500, (1, read))
    state = model.init_state(1)
    last = model(text, state=state)[0, -1]
    began = time.perf_counter()
    found, _ = generate(model, last, state, max_new_tokens=write)
    stepping = time.perf_counter() - began
    began = time.perf_counter()
    for token in found[:8]:
        text = torch.cat([text, torch.tensor([[token]])], 1)
        model(text)
    again = (time.perf_counter() - began) / 8 * write
    print(
        f"width {width}, {layers} blocks, after {read} tokens: {write / stepping:.0f} tokens a second by the state; "
        f"reading again for each token {again / stepping:.1f} times as long"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for width, modalities in ((512, 2), (512, 3)):
        blocks(width, modalities, 1024, 2, arguments.repeat)
    decoding(512, 8, 1024, 64)


if __name__ == "__main__":
    main()
