"""The CPU path of the Cauchy sums: kernels/native/cauchy.cpp, which wants real and imaginary parts apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo_kernels import _native as native


def unavailable() -> str | None:
    return native.missing("cauchy_forward", "cauchy_backward")


def unsupported(v, a, p, q) -> str | None:
    return None if v.device.type == "cpu" else f"v is on {v.device}; the native library runs on a CPU"


def _parts(x: Tensor, to: int | None = None, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, contiguous; the last axis padded to ``to`` by ``fill`` and 0."""
    re, im = torch.view_as_real(x.detach().resolve_conj()).unbind(-1)
    if to is None or to == x.shape[-1]:
        return re.contiguous(), im.contiguous()
    more = to - x.shape[-1]
    return F.pad(re, (0, more), value=fill).contiguous(), F.pad(im, (0, more)).contiguous()


def _arguments(v, a, p, q) -> tuple[list[int], list[Any], int]:
    """The numbers of ``CauchyArgs`` in order, what must stay alive during the call, and the padded number of nodes."""
    nodes = -(-p.shape[0] // 16) * 16
    alive = [*_parts(v), *_parts(a), *_parts(p, nodes, 1.0), *_parts(q, nodes)]
    dual = int(v.dtype == torch.complex128)
    return [*v.shape, nodes, native.threads(), dual, *(x.data_ptr() for x in alive)], alive, nodes


def forward(v, a, p, q, *, save) -> tuple[Tensor]:
    numbers, alive, nodes = _arguments(v, a, p, q)
    re, im = (torch.empty(*v.shape[:2], nodes, dtype=v.dtype.to_real()) for _ in range(2))
    native.function("cauchy_forward")(*numbers, re.data_ptr(), im.data_ptr())
    del alive
    return (torch.complex(re[..., : p.shape[0]], im[..., : p.shape[0]]).contiguous(),)


def backward(grads, arguments, saved, needs) -> list[Tensor | None]:
    v, a, p, q = arguments
    numbers, alive, nodes = _arguments(v, a, p, q)
    g = _parts(grads[0], nodes)
    dv = [torch.empty(v.shape, dtype=v.dtype.to_real()) for _ in range(2)]
    da = [torch.empty(a.shape, dtype=v.dtype.to_real()) for _ in range(2)]
    native.function("cauchy_backward")(*numbers, *(x.data_ptr() for x in (*g, *dv, *da)))
    del alive
    return [torch.complex(*dv), torch.complex(*da)]
