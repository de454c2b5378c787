"""The definition of the selective scan in plain torch: slow, any dtype, differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, path, reverse, initial_state, return_final_state, resets, lengths
) -> tuple[Tensor, Tensor | None]:
    """See :func:`zoo_kernels.selective_scan`; the same arguments."""
    single = A.dim() == 2
    batch, length = u.shape[:2]
    K = 1 if single else A.shape[0]
    work = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    real = work.to_real() if work.is_complex else work
    if single:  # give every argument its K axis
        u_, dt_, A_ = u[:, :, None], dt[:, :, None], A[None]
        B_, C_ = B[:, :, None], C[:, :, None]
        D_, bias_ = (None if p is None else p[None] for p in (D, dt_bias))
        init = None if initial_state is None else initial_state[:, None]
        path_ = None if path is None else (path[None, None] if path.dim() == 1 else path[:, None])
    else:
        u_ = u[:, :, None].expand(-1, -1, K, -1) if u.dim() == 3 else u
        dt_, A_, B_, C_, D_, bias_, init = dt, A, B, C, D, dt_bias, initial_state
        path_ = None if path is None else (path[None] if path.dim() == 2 else path)
    B_, C_ = (t[:, :, :, None] if t.dim() == 4 else t for t in (B_, C_))  # (batch, length, K, groups, state)
    repeat = A_.shape[1] // B_.shape[3]
    flags = [reverse] * K if isinstance(reverse, bool) else list(reverse)
    rows = torch.arange(batch, device=u.device)

    y = torch.zeros(batch, length, A_.shape[1], dtype=work, device=u.device)
    finals = []
    for k in range(K):
        d = dt_[:, :, k].to(real)
        if bias_ is not None:
            d = d + bias_[k].to(real)
        if dt_softplus:
            d = F.softplus(d)
        order = torch.arange(length, device=u.device)[None] if path_ is None else path_[:, k].long()
        order = order.expand(batch, -1)
        steps = order.shape[1]
        h = u.new_zeros(batch, *A_.shape[1:], dtype=work) if init is None else init[:, k].to(work)
        for t in range(steps):
            count = steps if lengths is None else lengths
            position = torch.as_tensor((count - 1 - t) if flags[k] else t, device=u.device).expand(batch)
            walked = (position >= 0) & (position < torch.as_tensor(count, device=u.device))
            row = order[rows, position.clamp(min=0)]
            x, dx = u_[rows, row, k].to(work), d[rows, row]
            b = B_[rows, row, k].to(work).repeat_interleave(repeat, dim=1)  # (batch, channels, state)
            c = C_[rows, row, k].to(work).repeat_interleave(repeat, dim=1)
            old = h if resets is None else torch.where(resets[rows, row][:, None, None], torch.zeros_like(h), h)
            new = torch.exp(dx[..., None] * A_[k].to(work)) * old + (dx * x)[..., None] * b
            h = torch.where(walked[:, None, None], new, h)
            out = (h * c).sum(-1)
            if D_ is not None:
                out = out + D_[k].to(work) * x
            y = y.index_put((rows, row), torch.where(walked[:, None], out, torch.zeros_like(out)), accumulate=True)
        finals.append(h)
    if work.is_complex:
        y = 2 * y.real  # conjugate pairs, as the original does for complex A
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    final = None
    if return_final_state:
        final = finals[0] if single else torch.stack(finals, dim=1)
    return y.to(u.dtype), final
