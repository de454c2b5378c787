"""A selective scan along K paths with K parameter sets: the mixer under Vim, VMamba and their relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo_kernels import path_linear, runtime, selective_scan

from .inference import results_only
from .init import inverse_softplus_log_uniform
from .linear import linear


class PathScan(nn.Module):
    """Project, scan each path with its own parameters, sum over the paths.

    ``(dt_r, B, C) = x_proj[k] u``, ``dt = dt_proj[k] dt_r``, then :func:`zoo_kernels.selective_scan` with
    ``A = -exp(A_log[k])``, ``D[k]`` and softplus of ``dt + dt_bias[k]`` inside the kernel. The projections act row by
    row, so they are done once in row order, and only the kernel knows about the paths. The second is the kernel's too:
    on a CPU no tensor of K dt's is written.

    Arguments: ``channels`` E, ``state`` N (per channel), ``dt_rank`` R, ``paths`` K. With ``shared`` all paths use one
    set of everything but A (Vim's "v1" ablation), so S = 1, otherwise S = K.
    Parameters: ``x_proj`` (S, R + 2N, E), ``dt_proj`` (S, E, R), ``dt_bias`` (S, E), ``A_log`` (K, E, N), ``D`` (S, E).
    Source: Gu and Dao, arXiv 2312.00752, section 3; Liu et al., "VMamba", arXiv 2401.10166, section 4.
    """

    def __init__(
        self,
        channels: int,
        state: int = 16,
        dt_rank: int | None = None,
        paths: int = 1,
        *,
        shared: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.channels, self.state, self.paths, self.shared = channels, state, paths, shared
        sets = 1 if shared else paths
        self.dt_rank = math.ceil(channels / 32) if dt_rank is None else dt_rank
        self.x_proj = nn.Parameter(torch.empty(sets, self.dt_rank + 2 * state, channels, **kind))
        self.dt_proj = nn.Parameter(torch.empty(sets, channels, self.dt_rank, **kind))
        self.dt_bias = nn.Parameter(torch.empty(sets, channels, **kind))
        self.A_log = nn.Parameter(torch.empty(paths, channels, state, **kind))
        self.D = nn.Parameter(torch.empty(sets, channels, **kind))
        self.dt_limits = (dt_min, dt_max, dt_floor)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's initialisation: A = -(1..N), D = 1, dt log-uniform in [dt_min, dt_max]."""
        dt_min, dt_max, floor = self.dt_limits
        with torch.no_grad():
            bound = self.channels**-0.5
            self.x_proj.uniform_(-bound, bound)
            bound = self.dt_rank**-0.5
            self.dt_proj.uniform_(-bound, bound)
            self.dt_bias.copy_(inverse_softplus_log_uniform(self.dt_bias, dt_min, dt_max, floor))
            self.A_log.copy_(torch.arange(1, self.state + 1, device=self.A_log.device).log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def forward(
        self,
        u: Tensor,
        *,
        z: Tensor | None = None,
        path: Tensor | None = None,
        reverse: bool | Sequence[bool] = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> Tensor:
        """u: (batch, length, E) shared by all paths, or (batch, length, K, E). z: (batch, length, E), gates the sum.

        path: None, (K, steps) or (batch, K, steps). projected: :meth:`project` of u, where it is known already.
        Returns (batch, length, E), the sum over paths.
        """
        dt_r, B, C, dt_proj, bias, D = self._terms(u, projected)
        A = -torch.exp(self.A_log.float())
        y, _ = selective_scan(
            u, dt_r, A, B, C, D, z, bias,
            dt_proj=dt_proj, dt_softplus=True, path=path, reverse=reverse, resets=resets, lengths=lengths,
        )  # fmt: skip
        return y

    def by_path(
        self,
        u: Tensor,
        *,
        z: Tensor | None = None,
        path: Tensor | None = None,
        reverse: bool | Sequence[bool] = False,
    ) -> Tensor:
        """What each path adds: (batch, K, length, E); the sum over K is :meth:`forward`. For looking, not for speed."""
        dt_r, B, C, dt_proj, bias, D = self._terms(u)
        A = -torch.exp(self.A_log.float())
        parts = []
        for k in range(self.paths):
            order = None if path is None else path.select(-2, k)
            flag = reverse if isinstance(reverse, bool) else reverse[k]
            y, _ = selective_scan(
                u if u.dim() == 3 else u[:, :, k], dt_r[:, :, k], A[k], B[:, :, k], C[:, :, k], D[k], z, bias[k],
                dt_proj=dt_proj[k], dt_softplus=True, path=order, reverse=flag,
            )  # fmt: skip
            parts.append(y)
        return torch.stack(parts, dim=1)

    def project(self, u: Tensor) -> Tensor:
        """Of u (..., E), shared by all paths: all sets' dt_r, B and C side by side, (..., S (R + 2N))."""
        return linear(u, self.x_proj.flatten(0, 1))

    def _terms(
        self, u: Tensor, projected: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dt_r (batch, length, K, R), B and C (batch, length, K, N), dt_proj (K, E, R), dt_bias and D (K, E)."""
        K, R, N = self.paths, self.dt_rank, self.state
        if self.shared and u.dim() != 3:
            raise ValueError(
                f"u has shape {tuple(u.shape)}; paths that share their projections share u: (batch, length, E)"
            )
        if u.dim() == 3:
            projected = self.project(u) if projected is None else projected
            projected = projected.unflatten(-1, (-1, R + 2 * N))  # (batch, length, S, R + 2N)
        elif not results_only(u, self.x_proj):
            projected = torch.einsum("blke,kce->blkc", u, self.x_proj)
        elif u.dtype == self.x_proj.dtype == torch.float32 and runtime.instruction_set() in runtime.OWN_PRODUCTS:
            projected = path_linear(u, self.x_proj)
        else:  # twice as fast as the batched product
            each = [linear(u[:, :, k].contiguous(), self.x_proj[k]) for k in range(K)]
            projected = torch.stack(each, dim=2)
        dt_r, B, C = projected.split([R, N, N], dim=-1)
        dt_proj, bias, D = self.dt_proj, self.dt_bias, self.D
        if self.shared:
            dt_r, B, C = (t.expand(-1, -1, K, -1) for t in (dt_r, B, C))
            dt_proj, bias, D = dt_proj.expand(K, -1, -1), bias.expand(K, -1), D.expand(K, -1)
        return dt_r, B, C, dt_proj, bias, D
