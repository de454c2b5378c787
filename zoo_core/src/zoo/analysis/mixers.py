"""The form of a layer's recurrence on a sequence: Mamba, Mamba-2, S4D, LRU, the study's attentions and qLSTM.

A layer is more than its recurrence: projections, a convolution, gates and norms lie around it. Its *core* is the part
that mixes positions, from the core's own inputs (for Mamba: x behind the convolution) to its outputs before the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import LRU, S4D, Mamba, Mamba2
from zoo_kernels import causal_conv1d, long_conv

from . import formulas
from .attention import CausalAttention, NormAttention
from .form import Form
from .qlstm import QLSTM


@dataclass(frozen=True)
class Core:
    """``form.outputs(inputs)`` is ``outputs``, which the layer's own code computed: (length, channels) each."""

    form: Form
    inputs: Tensor
    outputs: Tensor

    @property
    def error(self) -> float:
        """Largest difference between the form's outputs and the layer's, relative to the largest output."""
        difference = (self.form.outputs(self.inputs) - self.outputs).abs().max()
        return float(difference / self.outputs.abs().max().clamp(min=1e-30))


def core(mixer: nn.Module, x: Tensor, channels: Sequence[int] | None = None) -> Core:
    """The core of ``mixer`` on one sequence x (length, d_model).

    channels: of the core's inputs and outputs (all by default). Mamba, Mamba-2 and S4D do not mix channels, so a few of
    them are exact at a fraction of the memory: B holds length * N * channels numbers. Raises ValueError for layers that
    have no known form.
    """
    with torch.no_grad():
        found = _of(mixer, x)(mixer, x[None], channels)  # type: ignore[arg-type]
    return found


def decay(mixer: nn.Module, x: Tensor) -> Tensor:
    """The eigenvalues of A_i on one sequence x (length, d_model), without the rest of the form.

    Mamba: (length, channels, states); Mamba-2: (length, heads); S4D (channels, states) and LRU (states), which do not
    depend on x: (length, ...) of equal rows; attention: (length - 1, heads), eta_(i-1) / eta_i; qLSTM (length, hidden).
    """
    with torch.no_grad():
        if isinstance(mixer, Mamba):
            _, delta, _, _ = _mamba_parts(mixer, x[None])
            return torch.exp(-delta[0, :, :, None] * torch.exp(mixer.A_log))
        if isinstance(mixer, Mamba2):
            _, delta, _, _, _ = _mamba2_parts(mixer, x[None])
            return torch.exp(-delta[0] * torch.exp(mixer.A_log))
        if isinstance(mixer, S4D):
            return torch.exp(mixer.discrete()[0]).expand(len(x), -1, -1)
        if isinstance(mixer, LRU):
            return mixer.eigenvalues().expand(len(x), -1)
        if isinstance(mixer, QLSTM):
            return mixer.eigenvalues(x[None])[0]
        if isinstance(mixer, CausalAttention | NormAttention):
            return mixer.eigenvalues(x[None])[0].transpose(0, 1)
    raise ValueError(f"no eigenvalues are known for a {type(mixer).__name__}; known: {', '.join(_names())}")


def _mamba_parts(mixer: Mamba, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x behind the convolution, delta, b, c."""
    u, _ = mixer.in_proj(x).chunk(2, dim=-1)
    u, _ = causal_conv1d(u, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation="silu")
    dt, b, c = mixer.x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    return u, F.softplus(mixer.dt_proj(dt)), b, c


def _mamba(mixer: Mamba, x: Tensor, channels: Sequence[int] | None) -> Core:
    u, delta, b, c = _mamba_parts(mixer, x)
    y, _ = mixer.mix(x, gate=False)
    kept = _index(channels, u)
    form = formulas.s6(delta[0][:, kept], torch.exp(mixer.A_log)[kept], b[0], c[0], mixer.D[kept])
    return Core(form, u[0][:, kept], y[0][:, kept])


def _mamba2_parts(mixer: Mamba2, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x behind the convolution (batch, length, heads, P), delta, B and C with a group a head, the scan's output."""
    _, _, _, xBC, dt = mixer._split(x)
    y = mixer.scan(xBC, dt)
    act = "silu" if mixer.conv_activation == "silu" else None
    after, _ = causal_conv1d(xBC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation=act)
    u, B, C = mixer._parts(mixer._act(after))
    delta = F.softplus(dt + mixer.dt_bias).clamp(*mixer.dt_limit)
    repeat = mixer.nheads // mixer.ngroups
    return u, delta, B.repeat_interleave(repeat, dim=2), C.repeat_interleave(repeat, dim=2), y


def _mamba2(mixer: Mamba2, x: Tensor, channels: Sequence[int] | None) -> Core:
    u, delta, B, C, y = _mamba2_parts(mixer, x)
    kept = _index(channels, u.flatten(2))
    head = kept // mixer.headdim
    rate = torch.exp(mixer.A_log)[head]
    D = mixer.D[kept] if mixer.D_has_hdim else mixer.D[head]
    A = torch.exp(-delta[0][:, head] * rate)[:, :, None].expand(-1, -1, mixer.d_state)
    fed = delta[0][:, head, None] * B[0][:, head]
    form = Form(
        A.flatten(1), formulas._block(fed), formulas._block(C[0][:, head]).transpose(1, 2),
        torch.diag(D).expand(len(A), -1, -1),
    )  # fmt: skip
    return Core(form, u[0].flatten(1)[:, kept], y[0][:, kept])


def _s4d(mixer: S4D, x: Tensor, channels: Sequence[int] | None) -> Core:
    kept = _index(channels, x)
    log_A, C = mixer.discrete()
    y, _ = long_conv(x, mixer.kernel(x.shape[1]), mixer.D)
    length = x.shape[1]
    A, C = torch.exp(log_A)[kept].expand(length, -1, -1), (2 * C[kept]).expand(length, -1, -1)  # conjugate pairs
    form = Form(
        A.flatten(1), formulas._block(torch.ones_like(A)), formulas._block(C).transpose(1, 2),
        torch.diag(mixer.D[kept]).expand(length, -1, -1),
    )  # fmt: skip
    return Core(form, x[0][:, kept], y[0][:, kept])


def _lru(mixer: LRU, x: Tensor, channels: Sequence[int] | None) -> Core:
    _whole(channels, mixer)
    length = x.shape[1]
    B = torch.view_as_complex(mixer.B.detach().contiguous()) * torch.exp(mixer.gamma_log)[:, None]
    C = torch.view_as_complex(mixer.C.detach().contiguous())
    form = Form(
        mixer.eigenvalues().to(B.dtype).expand(length, -1), B.expand(length, -1, -1), C.expand(length, -1, -1),
        torch.diag(mixer.D).expand(length, -1, -1),
    )  # fmt: skip
    return Core(form, x[0], mixer(x)[0])


def _attention(mixer: CausalAttention | NormAttention, x: Tensor, channels: Sequence[int] | None) -> Core:
    """From the values to what out_proj receives, head by head."""
    _whole(channels, mixer)
    if isinstance(mixer, CausalAttention) and not mixer.lin_att:
        raise ValueError("softmax attention has no exact finite form; see formulas.softmax_weights and decay")
    q, k, v = mixer.parts(x)
    width = v.shape[-1]
    eye = torch.eye(width, dtype=v.dtype, device=v.device)
    eta = mixer.log_eta(x)[0].exp().to(v.dtype)
    parts = [formulas.separable_attention(q[0, :, h], k[0, :, h], eye, eta[h]) for h in range(v.shape[2])]
    form = Form(torch.cat([p.A for p in parts], dim=1), _blocks([p.B for p in parts]), _blocks([p.C for p in parts]))
    return Core(form, v[0].flatten(1), mixer.mix(x)[0])


def _blocks(parts: list[Tensor]) -> Tensor:
    """Block-diagonal matrices, one for each position."""
    return torch.stack([torch.block_diag(*(p[i] for p in parts)) for i in range(len(parts[0]))])


def _qlstm(mixer: QLSTM, x: Tensor, channels: Sequence[int] | None) -> Core:
    _, u, forget, write, read = (t[0] for t in mixer.parts(x))
    kept = _index(channels, u[None])
    eye = torch.eye(len(kept), dtype=u.dtype, device=u.device)
    form = formulas.qlstm(forget[:, kept], write[:, kept], read[:, kept], eye)
    state = torch.zeros_like(u[0])
    found = []
    for i in range(len(u)):
        state = forget[i] * state + write[i] * u[i]
        found.append(read[i] * state)
    return Core(form, u[:, kept], torch.stack(found)[:, kept])


def _index(channels: Sequence[int] | None, like: Tensor) -> Tensor:
    count = like.shape[-1]
    index = torch.arange(count, device=like.device) if channels is None else torch.as_tensor(list(channels))
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"channels {list(channels or ())} are not all among the core's {count}")
    return index.to(like.device)


def _whole(channels: Sequence[int] | None, mixer: nn.Module) -> None:
    if channels is not None:
        raise ValueError(f"{type(mixer).__name__} mixes its channels; channels must be None")


_CORES: dict[type[nn.Module], Callable[..., Core]] = {
    Mamba: _mamba,
    Mamba2: _mamba2,
    S4D: _s4d,
    LRU: _lru,
    CausalAttention: _attention,
    NormAttention: _attention,
    QLSTM: _qlstm,
}


def _names() -> list[str]:
    return [kind.__name__ for kind in _CORES]


def _of(mixer: nn.Module, x: Tensor) -> Callable[..., Core]:
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected one sequence, (length, d_model)")
    for kind, build in _CORES.items():
        if isinstance(mixer, kind):
            return build
    raise ValueError(f"no form is known for a {type(mixer).__name__}; known: {', '.join(_names())}")
