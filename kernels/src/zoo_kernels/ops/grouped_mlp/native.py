"""The CPU path of groups through a residual network: kernels/native/grouped_mlp.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels import _native as native


def unavailable() -> str | None:
    return native.missing("grouped_mlp")


def unsupported(table, base, index, *rest) -> str | None:
    *weights, _, scale = rest
    names = ("table", "base", "first", "first_bias", "second", "second_bias", "scale")
    return native.wrong_dtypes(names, (table, base, *weights, scale))


def forward(table, base, index, *rest, save) -> Tensor:
    *weights, anchor, scale = rest
    work = checks.state_dtype(table.dtype)
    wide_table, wide_base, *wide = (t.to(work).contiguous() for t in (table, base, *weights))
    scale = None if scale is None else scale.to(work).contiguous()
    index, anchor = index.contiguous(), None if anchor is None else anchor.contiguous()
    batch, points, channels = table.shape
    centres, neighbours = index.shape[1:]
    blocks, inner = weights[0].shape[:2]
    y = torch.empty(batch, centres, channels, dtype=work)
    if y.numel():
        native.function("grouped_mlp")(
            batch, points, centres, neighbours, channels, inner, blocks, native.threads(), int(work == torch.float64),
            wide_table.data_ptr(), wide_base.data_ptr(), index.data_ptr(), native.pointer(anchor),
            native.pointer(scale), *(w.data_ptr() for w in wide), y.data_ptr(),
        )  # fmt: skip
    return y.to(base.dtype)
