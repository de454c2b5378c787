"""Linear layers on a CPU: from the faster of torch's two libraries, in inference with what follows them fused.

Order of reading: which library serves, the function (:func:`linear`), modules (:class:`Linear`, :func:`call`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linear_training, sizes
from .inference import results_only, untouched

#: rows, and products of two numbers, below which calling is what takes the time
ROWS, PRODUCTS = 8, 1 << 21
#: name -> (oneDNN's name, its algorithm, torch's function)
ACTIVATIONS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "gelu": ("gelu", "none", F.gelu),
    "gelu_tanh": ("gelu", "tanh", functools.partial(F.gelu, approximate="tanh")),
    "relu": ("relu", "", F.relu),
    "silu": ("swish", "", F.silu),
    "sigmoid": ("sigmoid", "", torch.sigmoid),
    "tanh": ("tanh", "", torch.tanh),
}


# -- which library


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products are oneDNN's: torch asks MKL, which leaves AVX-512 unused on processors of AMD.

    Seen there: 2.2 times MKL's rate for (512, 768) x (768, 3072). Elsewhere MKL is as good, and torch's choice stays.
    """
    info = Path("/proc/cpuinfo")
    return (
        _has_onednn()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and info.exists()
        and "AuthenticAMD" in info.read_text(errors="replace")
    )


@functools.cache
def onednn_has_bfloat16() -> bool:
    """Whether bfloat16 products are oneDNN's anyway on this processor, so that fusing changes no library."""
    return _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> bool:
    """Whether oneDNN serves where nothing but the result is wanted: a large product of one type. (Its operators have
    no gradient and no place in a trace.)"""
    dtype = x.dtype
    return (
        (dtype == torch.float32 or dtype == torch.bfloat16)
        and weight.dtype == dtype
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # before sizes are asked for
        and x.numel() >= ROWS * x.shape[-1]
        and x.numel() * weight.shape[0] >= PRODUCTS
        and (bias is None or bias.dtype == dtype)
        and (add is None or add.dtype == dtype)
        and (onednn_is_faster() if dtype == torch.float32 else onednn_has_bfloat16())
    )


# -- the function


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: str | None = None, add: Tensor | None = None
) -> Tensor:
    """``act(F.linear(x, weight, bias))`` or ``F.linear(x, weight, bias) + add``, the same numbers to rounding.

    x: (..., in); weight: (out, in); bias: (out,); act: a name of :data:`ACTIVATIONS`; add: (..., out), a residual.
    Raises ValueError for another ``act``, and where ``act`` and ``add`` are both given.
    """
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; expected one of {', '.join(ACTIVATIONS)}, or None")
    if act is not None and add is not None:
        raise ValueError("act and add are both given; expected one of them, for which comes first would be unclear")
    if _onednn(x, weight, bias, add) and results_only(x, weight, bias, add):
        return _fused(x, weight, bias, act, add)
    learns = (
        linear_training.serves(x, weight, bias)
        and onednn_is_faster()
        and sizes.is_kept(x.numel() // x.shape[-1], weight, "training")
    )
    product = linear_training.product if learns else F.linear
    return _finished(product(x, weight, bias), act, add)


def _finished(y: Tensor, act: str | None, add: Tensor | None) -> Tensor:
    if add is not None:
        return y + add
    return ACTIVATIONS[act][2](y) if act else y


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, add: Tensor | None) -> Tensor:
    """By oneDNN: in one call, or in pieces of few sizes once many sizes were seen."""
    rows = x.numel() // x.shape[-1]
    if sizes.is_kept(rows, weight, (act, add is not None)):
        return _at_once(x, weight, bias, act, add)
    flat, added = x.reshape(rows, -1), None if add is None else add.reshape(rows, -1)
    y = x.new_empty(rows, weight.shape[0])
    for part, even in sizes.pieces(rows, at_least=max(4 * ROWS, PRODUCTS // weight.numel())):
        piece = None if added is None else added[part]
        if even:
            y[part] = _at_once(flat[part], weight, bias, act, piece)
        else:
            y[part] = _finished(F.linear(flat[part], weight, bias), act, piece)
    return y.view(*x.shape[:-1], -1)


def _at_once(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, add: Tensor | None) -> Tensor:
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add.contiguous(), weight, bias, "add")
    name, algorithm, _ = ACTIVATIONS[act] if act else ("none", "", None)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


# -- modules


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def activation_name(module: nn.Module) -> str | None:
    """The name in :data:`ACTIVATIONS` of torch's own activation module, None for any other module."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}.get(type(module))  # type: ignore[call-overload]


def call(layer: nn.Module, x: Tensor, *, act: nn.Module | None = None, add: Tensor | None = None) -> Tensor:
    """``act(layer(x)) + add``, by :func:`linear` where these are torch's own modules and nothing but the result is
    wanted; else the modules are called, whatever they are (adapters, quantised layers) and whoever watches them."""
    watched = (layer,) if act is None else (layer, act)
    name = None if act is None else activation_name(act)
    if (
        type(layer) in (nn.Linear, Linear)
        and (act is None or (name is not None and add is None))
        and results_only(x, layer.weight, layer.bias, add)  # type: ignore[arg-type]
        and untouched(*watched)
    ):
        weight, bias = layer.weight, layer.bias
        if _onednn(x, weight, bias, add):  # type: ignore[arg-type]
            return _fused(x, weight, bias, name, add)  # type: ignore[arg-type]
        return linear(x, weight, bias, act=name, add=add)  # type: ignore[arg-type]
    y = layer(x)
    if act is not None:
        y = act(y)
    return y if add is None else y + add
