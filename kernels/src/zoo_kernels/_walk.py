"""The order in which a scan visits rows, as index tensors: for references and for the export forms."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backends import exporting


def walk(
    path: Tensor | None, reverse: list[bool], lengths: Tensor | None, *, batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Rows (batch, K, steps) in the order of the visit, and which of these steps are walked: (batch, steps) or None.

    Steps beyond ``lengths`` come last and have some valid row; each direction starts at its own end.
    """
    K = len(reverse)
    steps = length if path is None else path.shape[-1]
    t = torch.arange(steps, device=device)
    flags = torch.tensor(reverse, device=device)[:, None]
    if lengths is None:
        position = torch.where(flags, steps - 1 - t, t)[None].expand(batch, K, steps)
        walked = None
    else:
        count = lengths[:, None, None]
        position = torch.where(flags, (count - 1 - t).clamp(min=0), t.expand(batch, K, steps))
        walked = t[None] < lengths[:, None]
    if path is None:
        return position, walked
    return path.expand(batch, K, steps).gather(2, position), walked


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (batch, length, K or 1, ...) along each walk: (batch, K, steps, ...)."""
    batch, K, _ = rows.shape
    b = torch.arange(batch, device=x.device)[:, None, None]
    k = torch.arange(K, device=x.device)[None, :, None] if x.shape[2] > 1 else torch.zeros_like(rows[:1, :1, :1])
    return x[b, rows, k]


def put_sum(values: Tensor, rows: Tensor, walked: Tensor | None, length: int) -> Tensor:
    """The reverse: (batch, K, steps, ...) added up over K at their rows: (batch, length, ...); other rows are 0."""
    batch, K, _ = rows.shape
    rest = values.shape[3:]
    if exporting():
        # onnxruntime adds up rows that are put twice on several threads at once, and loses some. No walk has a row
        # twice; its idle steps go to a row of their own.
        index = rows if walked is None else torch.where(walked[:, None], rows, torch.full_like(rows, length))
        b, k = torch.arange(batch, device=rows.device), torch.arange(K, device=rows.device)
        out = torch.zeros(batch, K, length + 1, *rest, dtype=values.dtype, device=values.device)
        return out.index_put((b[:, None, None], k[:, None], index), values)[:, :, :length].sum(1)
    if walked is not None:
        mask = walked[:, None, :].reshape(batch, 1, -1, *([1] * len(rest)))
        values = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    flat = (torch.arange(batch, device=rows.device)[:, None, None] * length + rows).reshape(-1)
    out = torch.zeros(batch * length, *rest, dtype=values.dtype, device=values.device)
    return out.index_add(0, flat, values.reshape(flat.shape[0], *rest)).reshape(batch, length, *rest)
