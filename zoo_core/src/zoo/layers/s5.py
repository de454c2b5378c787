"""S5: one diagonal state-space model with many inputs and outputs, run as a scan."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import linear_scan

from . import hippo
from .checkpointing import Recomputed
from .linear import Linear
from .precision import outside_autocast
from .ssm_kernel import as_complex, wide

State = dict[str, Tensor]
C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")
ACTIVATIONS = ("full_glu", "half_glu1", "half_glu2", "gelu")


def _lecun(*shape: int) -> Tensor:
    """Normal of variance 1 / fan-in (the last axis), cut at two deviations."""
    std = (1 / shape[-1]) ** 0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(*shape, device="cpu"), std=std, a=-2 * std, b=2 * std)


class S5(nn.Module):
    """``s_t = A s_{t-1} + B u_t``, ``y_t = Re(C s_t) + D u_t`` with diagonal complex A shared by all channels.

    ``ssm_size`` is the size of the real system; with ``conj_sym`` P = ssm_size / 2 complex states stand for it and y is
    twice the real part. ``blocks``: HiPPO-LegS blocks of the initialisation. ``bidirectional``: a second C reads the
    states of the reverse scan, both including the present step. ``clip_eigs``: real parts at most -1e-4.
    ``discretization``: "zoh" or "bilinear".

    Parameters: ``Lambda_re``, ``Lambda_im`` (P), ``B`` (P, H, 2), ``C`` (H, P, 2) [(H, 2P, 2) if bidirectional],
    ``D`` (H), ``log_step`` (P, 1). Source: Smith et al., arXiv 2208.04933; lindermanlab/S5 ``ssm.py``. Resets: Lu et
    al., arXiv 2303.03982, section 3.
    """

    def __init__(
        self,
        d_model: int,
        ssm_size: int,
        blocks: int = 1,
        *,
        conj_sym: bool = True,
        clip_eigs: bool = False,
        bidirectional: bool = False,
        C_init: str = "trunc_standard_normal",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization is {discretization!r}; expected 'zoh' or 'bilinear'")
        if C_init not in C_INITS:
            raise ValueError(f"C_init is {C_init!r}; expected one of {', '.join(C_INITS)}")
        kind = {"device": device, "dtype": dtype}
        H = d_model
        self.d_model, self.ssm_size, self.blocks, self.C_init = d_model, ssm_size, blocks, C_init
        self.conj_sym, self.clip_eigs, self.bidirectional = conj_sym, clip_eigs, bidirectional
        self.discretization = discretization
        P = ssm_size // 2 if conj_sym else ssm_size
        self.states = P
        self.Lambda_re, self.Lambda_im = nn.Parameter(torch.empty(P, **kind)), nn.Parameter(torch.empty(P, **kind))
        self.B = nn.Parameter(torch.empty(P, H, 2, **kind))
        self.C = nn.Parameter(torch.empty(H, (2 if bidirectional else 1) * P, 2, **kind))
        self.D = nn.Parameter(torch.empty(H, **kind))
        self.log_step = nn.Parameter(torch.empty(P, 1, **kind))
        with torch.no_grad():
            self.log_step.uniform_(math.log(dt_min), math.log(dt_max))
            self.D.normal_()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Eigenvalues and eigenvectors of the normal part of HiPPO-LegS; B and C random in its eigenbasis."""
        W, V = hippo.legs_normal_blocks(self.ssm_size, self.blocks)
        W, V = torch.from_numpy(W), torch.from_numpy(V)
        if not self.conj_sym:  # both of each pair
            W, V = torch.cat([W, W.conj()]), torch.cat([V, V.conj()], 1)
        cdt = torch.complex128
        B = V.conj().T @ _lecun(self.ssm_size, self.d_model).to(cdt)
        sides = []
        for _ in range(2 if self.bidirectional else 1):
            if self.C_init == "complex_normal":
                c = torch.randn(self.d_model, self.states, dtype=cdt, device="cpu")
            else:
                parts = [_lecun(self.d_model, self.ssm_size) for _ in range(2)]
                c = torch.complex(*parts).to(cdt) @ V
            sides.append(c)
        C = torch.cat(sides, 1)
        with torch.no_grad():
            self.Lambda_re.copy_(W.real)
            self.Lambda_im.copy_(W.imag)
            self.B.copy_(torch.view_as_real(B.resolve_conj()))
            self.C.copy_(torch.view_as_real(C.resolve_conj()))

    def discrete(self, step_rescale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """A (P), B (P, H), C (H, P or 2P), complex."""
        re = wide(self.Lambda_re)
        Lambda = torch.complex(re.clamp(max=-1e-4) if self.clip_eigs else re, wide(self.Lambda_im))
        step = step_rescale * torch.exp(wide(self.log_step)[:, 0])
        B, C = as_complex(self.B), as_complex(self.C)
        if self.discretization == "zoh":
            return torch.exp(Lambda * step), (torch.expm1(Lambda * step) / Lambda)[:, None] * B, C
        left = 1 / (1 - step / 2 * Lambda)
        return left * (1 + step / 2 * Lambda), (left * step)[:, None] * B, C

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        real = torch.promote_types(self.D.dtype if dtype is None else dtype, torch.float32)
        return {"ssm": torch.zeros(batch, self.states, dtype=real.to_complex(), device=device or self.D.device)}

    def forward(
        self,
        u: Tensor,
        *,
        state: State | None = None,
        resets: Tensor | None = None,
        path: Tensor | None = None,
        lengths: Tensor | None = None,
        step_rescale: float = 1.0,
    ) -> Tensor:
        """(batch, length, H) to the same. state: continued and left at the end (causal layers only). resets, path,
        lengths: as in :func:`zoo_kernels.linear_scan`."""
        A, B, C = self.discrete(step_rescale)
        Bu = _times(u, B)
        walk: dict[str, Any] = {"resets": resets, "path": path, "lengths": lengths}
        if self.bidirectional:
            if state is not None:
                raise ValueError("a bidirectional layer has no state to continue from; state must be None")
            ahead, _ = linear_scan(Bu, A, **walk)
            behind, _ = linear_scan(Bu, A, reverse=True, **walk)
            s = torch.cat([ahead, behind], -1)
        elif state is None:
            s, _ = linear_scan(Bu, A, **walk)
        else:
            s, final = linear_scan(Bu, A, initial_state=state["ssm"], return_final_state=True, **walk)
            assert final is not None
            state["ssm"] = final.detach()
        return (self._read(s, C) + self.D * u).to(u.dtype)

    def _read(self, s: Tensor, C: Tensor) -> Tensor:
        with outside_autocast(s):
            y = F.linear(s.real, C.real) - F.linear(s.imag, C.imag)
        return 2 * y if self.conj_sym else y

    def step(self, u: Tensor, state: State, *, reset: Tensor | None = None, step_rescale: float = 1.0) -> Tensor:
        """(batch, H) to the same; ``state`` is updated in place. reset: (batch,) bool, drop the old state first."""
        if self.bidirectional:
            raise ValueError("a bidirectional layer cannot step")
        A, B, C = self.discrete(step_rescale)
        s = state["ssm"]
        if reset is not None:
            s.masked_fill_(reset.bool()[:, None], 0)
        s.mul_(A).add_(_times(u, B))
        return (self._read(s, C) + self.D * u).to(u.dtype)


def _times(u: Tensor, B: Tensor) -> Tensor:
    """Real u (..., H) times complex B (P, H): (..., P), not in half precision, which has no complex numbers."""
    u = u.to(torch.promote_types(u.dtype, B.real.dtype))
    with outside_autocast(u):
        return torch.complex(F.linear(u, B.real), F.linear(u, B.imag))


class S5Layer(Recomputed):
    """``skip + act(S5(norm(x)))``: the residual layer of S5 models.

    ``activation``, with g = gelu(x): "full_glu" (out1(g) * sigmoid(out2(g))), "half_glu1" (g * sigmoid(out2(g))),
    "half_glu2" (x * sigmoid(out2(g))), "gelu" (g); GELU is the tanh approximation, as in Flax. ``norm``: "layer" (eps
    1e-6), "batch" (eps 1e-5) or None, before (``prenorm``) or after; ``inner_norm`` applies the same norm right after
    the SSM, too, and ``outer_norm=False`` leaves out the other one. Keys: ``seq.*``, ``norm.{weight,bias}``, ``out1``,
    ``out2``. Source: lindermanlab/S5 ``layers.py``; inner norm: luchris429/popjaxrl ``s5.py`` (``do_gtrxl_norm``).
    """

    def __init__(
        self,
        d_model: int,
        ssm_size: int,
        *,
        activation: str = "full_glu",
        prenorm: bool = True,
        norm: str | None = "layer",
        outer_norm: bool = True,
        inner_norm: bool = False,
        dropout: float = 0.0,
        device=None,
        dtype=None,
        **ssm: object,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        kind = {"device": device, "dtype": dtype}
        self.activation, self.prenorm, self.outer_norm, self.inner_norm = activation, prenorm, outer_norm, inner_norm
        self.seq = S5(d_model, ssm_size, **ssm, **kind)  # type: ignore[arg-type]
        self.norm: nn.Module | None = None
        if norm == "layer":
            self.norm = nn.LayerNorm(d_model, eps=1e-6, **kind)
        elif norm == "batch":
            self.norm = _BatchNorm(d_model, eps=1e-5, **kind)
        elif norm is not None:
            raise ValueError(f"norm is {norm!r}; expected 'layer', 'batch' or None")
        if activation == "full_glu":
            self.out1 = Linear(d_model, d_model, **kind)
        if activation != "gelu":
            self.out2 = Linear(d_model, d_model, **kind)
        self.drop = nn.Dropout(dropout)

    def _norm(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _around(self, x: Tensor, mix) -> Tensor:
        skip = x
        if self.prenorm and self.outer_norm:
            x = self._norm(x)
        x = mix(x)
        if self.inner_norm:
            x = self._norm(x)
        g = F.gelu(x, approximate="tanh")
        if self.activation == "full_glu":
            g = self.drop(g)
            x = self.drop(self.out1(g) * torch.sigmoid(self.out2(g)))
        elif self.activation == "half_glu1":
            g = self.drop(g)
            x = self.drop(g * torch.sigmoid(self.out2(g)))
        elif self.activation == "half_glu2":
            x = self.drop(x * torch.sigmoid(self.out2(self.drop(g))))
        else:
            x = self.drop(g)
        x = skip + x
        return x if self.prenorm or not self.outer_norm else self._norm(x)

    def forward(self, x: Tensor, *, state: State | None = None, **walk) -> Tensor:
        """(batch, length, d_model) to the same; arguments as :class:`S5`."""
        return self._around(x, lambda h: self.seq(h, state=state, **walk))

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        return self.seq.init_state(batch, device=device, dtype=dtype)

    def step(self, x: Tensor, state: State, **options) -> Tensor:
        """(batch, d_model) to the same; ``state`` is updated in place."""
        return self._around(x, lambda h: self.seq.step(h, state, **options))


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis, over all others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).reshape(x.shape)
