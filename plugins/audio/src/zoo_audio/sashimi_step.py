"""SaShiMi sample by sample, fast: what a step needs is made once, and a step is as few small operations as it can be.

:meth:`zoo_audio.sashimi.Sashimi.step` calls every layer's own step, which serves every form of the model and training
code. Here the usual form (pre-norm, one channel, S4 or S4D, feed-forward) is unrolled: pooling matrices without their
weight norm, normalisation in one call, and S4's recurrence in the eigenbasis of its discrete matrix, one multiply-add
for each state. Anything else falls back to the layer's own step, so results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.fft_conv import FFTConv, S4Block
from zoo.layers.s4 import S4Kernel
from zoo.layers.s4d import S4DKernel
from zoo.models.s4 import FeedForward, SequenceBlock
from zoo.models.s4_parts import Residual, ScalarNorm

from .sashimi import DownPool, SashimiLM, UpPool

#: Eigenvectors that rebuild the discrete matrix less exactly than this are not used.
EXACT = 1e-9
Step = Callable[[Tensor], Tensor]


class Stepper:
    """``step`` tokens (batch,) to logits (batch, vocab_size), for inference; the state, of one size, is inside.

    Made from a model's present weights: make another one after they change.
    """

    def __init__(self, model: SashimiLM, batch: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}; expected 1 or more")
        if not model.model.causal:
            raise ValueError("a bidirectional SaShiMi cannot step")
        backbone = model.model.eval()
        with torch.inference_mode():
            self.embedding, self.unet = model.encoder.weight.detach(), backbone.unet
            self.down = [self._part(layer, batch) for layer in backbone.d_layers]
            self.center = [self._part(layer, batch) for layer in backbone.c_layers]
            self.up = [[self._part(layer, batch) for layer in tier] for tier in backbone.u_layers]  # type: ignore[union-attr]
            self.norm, self.head = backbone.norm, linear(model.decoder)

    @staticmethod
    def _part(layer: nn.Module, batch: int) -> Any:
        if type(layer) is DownPool:
            return Down(layer)
        if type(layer) is UpPool:
            return Up(layer, batch)
        if isinstance(layer, SequenceBlock):
            return block(layer, batch)
        state = layer.init_state(batch)  # type: ignore[operator]
        return lambda x: layer.step(x, state)  # type: ignore[operator]

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Token ids (batch,) int64 of one sample to the logits (batch, vocab_size) of the next."""
        x: Tensor | None = self.embedding[tokens]
        skips = [x]
        for part in self.down:
            x = None if x is None else part(x)
            skips.append(x)
        if x is not None:
            for part in self.center:
                x = part(x)
            x = x + skips.pop()  # type: ignore[operator]
        else:
            skips.pop()
        for tier in self.up:
            x = self._climb(tier, x, skips)
        assert x is not None
        return self.head(self.norm(x))

    def _climb(self, tier: list[Any], x: Tensor | None, skips: list[Tensor | None]) -> Tensor | None:
        """One rate of the way up; nothing happens where it is not due."""
        if skips[-1] is None:
            del skips[-(len(tier) if self.unet else 1) :]
            return None
        if self.unet:
            for part in tier:
                x = part(x) + skips.pop()
            return x
        y = first = tier[0](x) + skips.pop()
        for part in tier[1:]:
            y = part(y)
        return y + first


def linear(layer: nn.Linear) -> Step:
    """``layer`` as one call on (batch, in_features), its weight transposed once."""
    weight, bias = layer.weight.detach().t().contiguous(), layer.bias.detach()
    return lambda x: torch.addmm(bias, x, weight)


class Down:
    """Holds ``pool`` values and gives their pooled one with the last."""

    def __init__(self, layer: DownPool) -> None:
        self.pool, self.held = layer.pool, list[Tensor]()
        self.weight, self.bias, self.act = layer.linear.matrix().t().contiguous(), layer.linear.bias, layer.linear.act

    def __call__(self, x: Tensor) -> Tensor | None:
        self.held.append(x)
        if len(self.held) < self.pool:
            return None
        folded = torch.stack(self.held, -1).flatten(1)
        self.held.clear()
        return self.act(torch.addmm(self.bias, folded, self.weight))


class Up:
    """Hands out the values of the last pooled step; the new one is taken in when none is left."""

    def __init__(self, layer: UpPool, batch: int) -> None:
        self.pool, self.width = layer.pool, layer.width
        self.weight, self.bias, self.act = layer.linear.matrix().t().contiguous(), layer.linear.bias, layer.linear.act
        self.held = [self.bias.new_zeros(batch, self.width) for _ in range(self.pool)]

    def __call__(self, x: Tensor | None) -> Tensor:
        y = self.held.pop(0)
        if not self.held:
            assert x is not None
            made = self.act(torch.addmm(self.bias, x, self.weight)).unflatten(1, (self.width, self.pool))
            self.held = list(made.unbind(-1))
        return y


def block(layer: SequenceBlock, batch: int) -> Step:
    """A residual block as one function of (batch, width)."""
    inner = layer.layer
    normed = norm(layer.norm.norm)
    plain = type(layer.residual) is Residual and layer.residual.alpha == layer.residual.beta == 1
    usual = layer.prenorm and plain and not layer.bidirectional and normed is not None
    if usual and isinstance(inner, FeedForward) and isinstance(inner.ff[0][1], nn.GELU):  # type: ignore[index]
        first, last = linear(inner.ff[0][0]), linear(inner.ff[2])  # type: ignore[index, arg-type]
        return lambda x: x + last(F.gelu(first(normed(x))))  # type: ignore[misc]
    if usual and isinstance(inner, S4Block):
        mixer = convolution(inner.layer, batch)
        if mixer is not None and isinstance(inner.mult_act, nn.Identity):
            tail = output(inner.output_linear)
            if tail is not None:
                return lambda x: x + tail(mixer(normed(x)))  # type: ignore[misc]
    state = layer.init_state(batch)
    return lambda x: layer.step(x, state)


def output(layer: nn.Module) -> Step | None:
    """What follows S4: the linear map with GLU as two calls, or the layer itself."""
    if isinstance(layer, nn.Sequential) and isinstance(layer[1], nn.GLU):
        wide = linear(layer[0])  # type: ignore[arg-type]
        return lambda y: F.glu(wide(y), -1)
    return layer if isinstance(layer, nn.Module) else None


def norm(layer: nn.Module) -> Step | None:
    """Layer norms in one call. The scalar one is ``s (x - mean) / std + s m / std``."""
    if isinstance(layer, ScalarNorm):
        scale, shift = float(layer.s), float(layer.s * layer.m)

        def scalar(x: Tensor) -> Tensor:
            y, _, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, 0.0)
            return torch.add(y.mul_(scale), inverse, alpha=shift)

        return scalar
    return layer if isinstance(layer, nn.LayerNorm) else None


def convolution(layer: FFTConv, batch: int) -> Step | None:
    """``act(C s + D x)`` with ``s = a s + b x``; None for kernels without such a form."""
    kernel = layer.kernel
    if layer.channels != 1 or layer.D.shape[0] != 1 or layer.l_max is not None:
        return None
    found: tuple[Tensor, Tensor, Tensor] | None = None
    if isinstance(kernel, S4Kernel):
        found = eigenbasis(kernel)
    elif isinstance(kernel, S4DKernel) and kernel.disc != "dss" and not kernel.is_real:
        log_dA, dB, C = kernel.discrete()
        found = torch.exp(log_dA).to(C.dtype), dB, 2 * C[0]
    if found is None:
        return None
    a, b, c = found
    width = a.shape[0]
    D = layer.D[0].detach().to(c.real.dtype)  # the state stays in single precision where the weights are halves
    row = torch.stack([c.real, -c.imag], -1).flatten(1).contiguous()  # Re(c s) as a product of real numbers
    state = torch.zeros(batch, *a.shape, dtype=a.dtype)
    flat = torch.view_as_real(state).view(batch, width, -1)
    act = F.gelu if isinstance(layer.act, nn.GELU) else layer.act

    def run(x: Tensor) -> Tensor:
        state.mul_(a).add_(b * x.unsqueeze(-1))
        return act(torch.addcmul((flat * row).sum(-1), D, x).to(x.dtype))

    return run


def eigenbasis(kernel: S4Kernel) -> tuple[Tensor, Tensor, Tensor] | None:
    """Eigenvalues, inputs and outputs of the discrete system, one of each conjugate pair (its output doubled); None
    where the eigenvectors are too nearly parallel to be used."""
    dA, dB = kernel.dense()  # float64, on [Re s, Im s]
    C = kernel.output_row(dA, kernel.step_limited)[0]
    values, V = torch.linalg.eig(dA)
    b = torch.linalg.solve(V, dB.to(V.dtype)[..., None]).squeeze(-1)
    rebuilt = torch.linalg.solve(V, (V * values[..., None, :]), left=False)
    if float((rebuilt - dA).abs().max() / dA.abs().max()) > EXACT:
        return None
    c = torch.einsum("hm,hmn->hn", (2 * torch.cat([C.real, -C.imag], -1)).to(V.dtype), V)
    upper = values.imag >= 0
    weight = torch.where(values.imag > 0, 2.0, 1.0) * upper
    # Rows with real eigenvalues keep more of them: the others are filled up with states that stay zero.
    count = int(upper.sum(-1).max())
    order = upper.int().argsort(dim=-1, descending=True, stable=True)[:, :count]
    a, b, c = (t.gather(1, order) for t in (values * upper, b * upper, c * weight))
    kind = torch.promote_types(kernel.inv_dt.dtype, torch.float32).to_complex()
    return a.to(kind), b.to(kind), c.to(kind)
