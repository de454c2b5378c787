"""The definition of groups through a residual network; all rows of all groups lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import _checks as checks


def forward(table, base, index, first, first_bias, second, second_bias, anchor, scale, *, save=False) -> Tensor:
    """See :func:`zoo_kernels.grouped_mlp`."""
    work = checks.state_dtype(table.dtype)
    batch = torch.arange(len(table), device=table.device)[:, None]
    x = table.to(work)[batch[..., None], index]
    if anchor is not None:
        x = x - table.to(work)[batch, anchor].unsqueeze(2)
    if scale is not None:
        x = x * scale.to(work)[:, None, None, None]
    x = (x + base.to(work).unsqueeze(2)).relu()
    for one, one_bias, two, two_bias in zip(first, first_bias, second, second_bias, strict=True):
        inside = (x @ one.to(work).t() + one_bias.to(work)).relu()
        x = (inside @ two.to(work).t() + two_bias.to(work) + x).relu()
    return x.amax(dim=2).to(base.dtype)
