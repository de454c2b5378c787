"""Forecasts that every forecaster must beat: the last value, the last season, a linear map."""

from __future__ import annotations

import torch
from torch import Tensor


def last_value(series: Tensor, horizon: int) -> Tensor:
    """(batch, length, columns) to (batch, horizon, columns): the last value stays."""
    return series[:, -1:].expand(-1, horizon, -1)


def periods(series: Tensor) -> Tensor:
    """The strongest period of each column of (batch, length, columns), int64 (batch, columns), at most half the length.

    A line is taken off, then the highest autocorrelation behind its first zero crossing wins.
    """
    length = series.shape[1]
    t = torch.linspace(-1, 1, length, dtype=series.dtype)
    x = series.transpose(1, 2)
    x = x - x.mean(-1, keepdim=True)
    x = x - t * ((x * t).sum(-1, keepdim=True) / (t * t).sum())
    power = torch.fft.rfft(x, n=2 * length).abs().square()
    kept = max(length // 2, 1)
    like = torch.fft.irfft(power, n=2 * length)[..., :kept] / (length - torch.arange(kept))
    crossed = (like < 0).cummax(-1).values
    found = like.masked_fill(~crossed, -torch.inf).argmax(-1)
    return torch.where(crossed.any(-1), found, 1).clamp(min=1)


def seasonal_naive(series: Tensor, horizon: int, period: int | None = None) -> Tensor:
    """The last season again, (batch, length, columns) to (batch, horizon, columns); ``period`` None: :func:`periods`.

    Raises ValueError for a period that is longer than the series.
    """
    batch, length, columns = series.shape
    if period is not None and not 1 <= period <= length:
        raise ValueError(f"period is {period}; expected between 1 and the series' length {length}")
    p = periods(series) if period is None else torch.full((batch, columns), period)
    steps = length - p[:, None] + torch.arange(horizon)[:, None] % p[:, None]
    return series.gather(1, steps)


def ridge(history: Tensor, target: Tensor, series: Tensor, strength: float = 100.0) -> Tensor:
    """The best linear map from ``history`` (n, length, columns) to ``target`` (n, horizon, columns), one for all
    columns, fitted with an L2 penalty; applied to ``series``."""

    def rows(x: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(0, 1).double()
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1)

    x, y = rows(history), target.transpose(1, 2).flatten(0, 1).double()
    weights = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    found = rows(series) @ weights
    return found.unflatten(0, (len(series), -1)).transpose(1, 2).to(series.dtype)
