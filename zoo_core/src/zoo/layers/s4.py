"""S4: state-space kernels with a diagonal-plus-low-rank state matrix (DPLR, also called NPLR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo_kernels import cauchy, unit_roots

from .ssm_kernel import SSMKernel, as_complex

STEP_MODES = ("linear", "dense", "diagonal")


class S4Kernel(SSMKernel):
    """Kernel of a system with A = diag - P P^*, discretised by the bilinear rule.

    Beside the parameters of :class:`~zoo.layers.ssm_kernel.SSMKernel`: ``P`` (rank, S, N, 2) and the buffer
    ``l_kernel``: while it is 0, ``C`` is the system's; the first forward in training replaces C by C (I - dA^l), which
    makes the kernel's generating function of length l = ``l_max`` (or the length asked for) exact, and sets l_kernel; a
    longer input later doubles it. State dicts of trained models hold the replaced C, as the original's do. In eval mode
    nothing is written (the original writes there, too): the replacement is made for the call alone.

    ``init``: "legs", "legt" (rank 2), "fout", "hippo", "dplr-lin" ...
    Source: Gu et al., arXiv 2111.00396, algorithm 1; state-spaces/s4 ``SSMKernelDPLR``.
    """

    def __init__(self, d_model: int, channels: int = 1, l_max: int | None = None, lr=None, **system: Any) -> None:
        system.pop("disc", None)  # always bilinear; the original accepts and ignores the argument, too
        if system.get("is_real"):
            raise ValueError("is_real is defined for diagonal kernels (mode 'diag') only")
        super().__init__(d_model, channels, l_max, lr, low_rank=True, **system)
        self.register_buffer("l_kernel", torch.tensor(0))
        self.step_mode, self.step_limited = "linear", True
        self._length: int | None = None

    def low_rank(self) -> Tensor:
        """P (rank, H, N) complex."""
        return as_complex(self.P).repeat(1, self.d_model // self.n_ssm, 1)

    # -- the convolution kernel ------------------------------------------------------------------------------------

    def internal_length(self) -> int:
        """``l_kernel`` as a number. A graph that is being traced holds it as a constant, known since the last forward
        or change between training and evaluation."""
        if self.l_kernel.is_meta:  # shapes are all that is asked for, and they do not depend on it
            return self._length or 0
        if self._length is None or not torch.compiler.is_compiling():
            self._length = int(self.l_kernel)
        return self._length

    def train(self, mode: bool = True) -> S4Kernel:
        self._length = None if self.l_kernel.is_meta else int(self.l_kernel)
        return super().train(mode)  # type: ignore[return-value]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._length = None
        super()._load_from_state_dict(*args, **kwargs)

    def lengthen(self, length: int) -> tuple[int, list[tuple[int, float]]]:
        """The internal kernel length that covers ``length`` steps, and how to get there from the present one: a list of
        (l, sign), for each of which C becomes C (I + sign dA^l)."""
        have, plan = self.internal_length(), []
        if have == 0:
            have = self.l_max or length
            plan.append((have, -1.0))
        while 0 < have < length:
            plan.append((have, 1.0))
            have *= 2
        return have, plan

    def has_length(self, length: int, rate: float = 1.0) -> bool:
        if rate == 1.0:  # nothing to round, and l_kernel, which may lie on a device, need not be read
            return True
        internal, _ = self.lengthen(round(rate * length))
        return round(internal / rate) >= length  # rounding may lose a tap

    def _times_powers(self, C: Tensor, plan: list[tuple[int, float]]) -> Tensor:
        """C (I + sign dA^l) for every (l, sign), in float64."""
        dA, _ = self.dense()
        wide = C.to(torch.complex128)
        row = torch.cat([wide.real, -wide.imag], -1)
        for length, sign in plan:
            row = row + sign * torch.einsum("chm,hmn->chn", row, torch.linalg.matrix_power(dA, length))
        a, b = row.chunk(2, dim=-1)
        return torch.complex(a, -b).to(C.dtype)

    @torch.no_grad()
    def _write_length(self, length: int, plan: list[tuple[int, float]]) -> None:
        C = self._times_powers(torch.view_as_complex(self.C.to(torch.float64).contiguous()), plan)
        self.C.copy_(torch.view_as_real(C))
        self.l_kernel.fill_(length)
        self._length = length

    def forward(self, length: int, rate: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        K = self._convolutions(length, rate, state, own=True)
        return K[-1], None if state is None else K[:-1]

    def response(self, state: Tensor, length: int, rate: float = 1.0) -> Tensor:
        return self._convolutions(length, rate, state, own=False)

    def _convolutions(self, length: int, rate: float, state: Tensor | None, own: bool) -> Tensor:
        """(rows, channels, d_model, length): what each state of the batch adds to the output, and last, if ``own``, the
        convolution kernel."""
        internal, plan = self.lengthen(round(rate * length))
        write = bool(plan) and self.training and not torch.compiler.is_compiling()
        if write:
            self._write_length(internal, plan)
        points = round(internal / rate)
        if points == 0:
            return self.C.new_zeros((0 if state is None else state.shape[0]) + own, self.channels, self.d_model, 0)
        dt, A, B, C = self.system(rate)
        if plan and not write:
            longer = self.kept(("C", internal), lambda: self._times_powers(as_complex(self.C), plan))
            C = self.band(longer, dt / rate, A)
        P = self.low_rank()
        if state is not None:
            PQs = torch.einsum("bhm,rhm->bhr", state, P.conj())
            PQs = 2 * PQs.real  # the conjugate half adds the conjugate
            As = state * A - torch.einsum("bhr,rhn->bhn", PQs.to(P.dtype), P)
            B = torch.cat([state / dt + As / 2, B]) if own else state / dt + As / 2
        rows, columns = torch.cat([B, P]), torch.cat([C, P.conj()])
        v = rows[:, None] * columns[None] * dt  # (rows, columns, H, N)
        p, q = unit_roots(points, dtype=v.dtype, device=v.device)
        r = cauchy(v.flatten(0, 1), dt * A, p, q).unflatten(0, v.shape[:2])  # times 2 / (1 + w)
        k = self.rank
        r00, r01, r10, r11 = r[:-k, :-k], r[:-k, -k:], r[-k:, :-k], r[-k:, -k:]
        # Woodbury; r11 times (1 + w) / 2 is the sum without the factor, and so is one of r01, r10
        half = q / 2
        if k == 1:
            f = r00 - half * r01 * r10 / (1 + half * r11)
        else:
            inner = (half * r11).permute(2, 3, 0, 1) + torch.eye(k, dtype=r.dtype, device=r.device)
            solved = torch.linalg.solve(inner, r10.permute(2, 3, 0, 1))  # (H, nodes, k, columns)
            f = r00 - half * torch.einsum("ijhn,hnjl->ilhn", r01, solved)
        return torch.fft.irfft(f, n=points)[..., :length]

    # -- the recurrence --------------------------------------------------------------------------------------------

    def dense(self, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """The discrete system on [Re s, Im s] in float64: dA (H, 2N, 2N), dB (H, 2N)."""
        dt, A, B, _ = self.system(rate)
        dt, A = dt.double().expand(A.shape), A.to(torch.complex128)
        P = self.low_rank().to(torch.complex128)
        X = torch.diag_embed(A) - torch.einsum("rhm,rhn->hmn", P, P.conj())
        Y = -torch.einsum("rhm,rhn->hmn", P, P)
        plus, minus = X + Y, X - Y
        full = torch.cat([torch.cat([plus.real, -minus.imag], -1), torch.cat([plus.imag, minus.real], -1)], -2)
        b = B[0].to(torch.complex128)
        scale = torch.cat([dt, dt], -1)
        M = scale[..., None] / 2 * full
        eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        right = torch.cat([eye + M, (scale * torch.cat([b.real, b.imag], -1))[..., None]], -1)
        solved = torch.linalg.solve(eye - M, right)
        return solved[..., :-1], solved[..., -1]

    def output_row(self, dA: Tensor, limited: bool = True) -> Tensor:
        """The system's own C (channels, H, N) in complex128, recovered from the one that is stored.

        ``limited``: what the band limit leaves of the stored one, which is what the convolution sees; the original's
        steps forget the limit.
        """
        C = (self.system()[3] if limited else as_complex(self.C)).detach().to(torch.complex128)
        length = self.internal_length()
        if length == 0:
            return C
        row = torch.cat([C.real, -C.imag], -1)  # (channels, H, 2N)
        eye = torch.eye(row.shape[-1], dtype=row.dtype, device=row.device)
        left = (eye - torch.linalg.matrix_power(dA, length)).transpose(-1, -2)
        a, b = torch.linalg.solve(left, row[..., None]).squeeze(-1).chunk(2, dim=-1)
        return torch.complex(a, -b)

    def setup_step(self, mode: str = "linear", limited: bool = True) -> None:
        """How :meth:`step` computes: "linear" (O(N), default), "dense" (the full matrix), "diagonal" (its eigenvalues).

        All give the same output; "diagonal" keeps its state in the eigenbasis. limited: see :meth:`output_row`.
        """
        if mode not in STEP_MODES:
            raise ValueError(f"step mode is {mode!r}; expected one of {', '.join(STEP_MODES)}")
        self.step_mode, self.step_limited = mode, limited
        self._kept.clear()

    def init_state(self, batch: int, *, device=None, dtype=None) -> Tensor:
        state = super().init_state(batch, device=device, dtype=dtype)
        return state.repeat(1, 1, 2) if self.step_mode == "diagonal" else state

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        """u: (batch, d_model); ``state`` is updated in place. Returns (batch, channels, d_model)."""
        with torch.no_grad():
            constants = self.kept(("step", self.step_mode), getattr(self, f"_prepare_{self.step_mode}"), watch=False)
        return getattr(self, f"_step_{self.step_mode}")(u, state, *constants)

    def _prepare_linear(self) -> tuple[Tensor, ...]:
        dt, A, B, _ = self.system()
        dA, _ = self.dense()
        dt, A, B = dt.double(), A.to(torch.complex128), B[0].to(torch.complex128)
        P = self.low_rank().to(torch.complex128)  # (rank, H, N)
        D = 1 / (2 / dt - A)
        E = 2 / dt + A
        DP = D * P
        inner = 2 * torch.einsum("rhn,shn->hrs", P.conj(), DP).real
        inner = torch.linalg.inv(inner + torch.eye(self.rank, dtype=inner.dtype, device=inner.device))
        C = 2 * self.output_row(dA, self.step_limited)
        work = torch.promote_types(self.inv_dt.dtype, torch.float32).to_complex()
        named = (D, E, 2 * B, P, P.conj(), DP, C)
        return (*(t.to(work).contiguous() for t in named), inner.to(work.to_real()))

    def _step_linear(self, u, state, D, E, B2, P, Pc, DP, C, inner) -> Tensor:
        # (2/dt - A + P P^*) s' = (2/dt + A - P P^*) s + 2 B u, by Woodbury
        low = 2 * torch.einsum("rhn,bhn->bhr", Pc, state).real
        right = E * state - torch.einsum("bhr,rhn->bhn", low.to(P.dtype), P) + B2 * u[..., None]
        new = D * right
        low = 2 * torch.einsum("rhn,bhn->bhr", Pc, new).real
        low = torch.einsum("hrs,bhs->bhr", inner, low)
        state.copy_(new - torch.einsum("bhr,rhn->bhn", low.to(DP.dtype), DP))
        return torch.einsum("chn,bhn->bch", C, state).real

    def _prepare_dense(self) -> tuple[Tensor, ...]:
        dA, dB = self.dense()
        C = self.output_row(dA, self.step_limited)
        row = 2 * torch.cat([C.real, -C.imag], -1)
        work = torch.promote_types(self.inv_dt.dtype, torch.float32)
        return dA.to(work), dB.to(work), row.to(work)

    def _step_dense(self, u, state, dA, dB, row) -> Tensor:
        s = torch.cat([state.real, state.imag], -1)
        s = torch.einsum("hmn,bhn->bhm", dA, s) + dB * u[..., None]
        state.copy_(torch.complex(*s.chunk(2, dim=-1)))
        return torch.einsum("chn,bhn->bch", row, s)

    def _prepare_diagonal(self) -> tuple[Tensor, ...]:
        dA, dB = self.dense()
        C = self.output_row(dA, self.step_limited)
        row = 2 * torch.cat([C.real, -C.imag], -1)
        values, V = torch.linalg.eig(dA)
        work = torch.promote_types(self.inv_dt.dtype, torch.float32).to_complex()
        b = torch.linalg.solve(V, dB.to(V.dtype)[..., None]).squeeze(-1)
        return values.to(work), b.to(work), torch.einsum("chm,hmn->chn", row.to(V.dtype), V).to(work)

    def _step_diagonal(self, u, state, values, b, row) -> Tensor:
        state.mul_(values).add_(b * u[..., None])
        return torch.einsum("chn,bhn->bch", row, state).real

    @torch.no_grad()
    def final_state(self, u: Tensor, state: Tensor, rate: float = 1.0, block: int = 64) -> Tensor:
        """The state after u (batch, length, d_model), sampled at ``rate``, from ``state`` (batch, d_model, N)."""
        length = u.shape[1]
        block = max(min(block, length), 1)
        first = length % block
        jumps = self.kept(("state", block, first, rate), lambda: self._jumps(block, first, rate))
        start, leap, krylov = jumps
        s = torch.cat([state.real, state.imag], -1).to(krylov.dtype)
        for begin, stop in [(0, first), *((i, i + block) for i in range(first, length, block))]:
            if stop > begin:
                s = torch.einsum("hmn,bhn->bhm", start if stop - begin < block else leap, s)
                piece = u[:, begin:stop].flip(1).to(s.dtype)
                s = s + torch.einsum("hmj,bjh->bhm", krylov[..., : stop - begin], piece)
        return torch.complex(*s.chunk(2, dim=-1)).to(state.dtype)

    def _jumps(self, block: int, first: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """dA^first and dA^block (H, 2N, 2N), dA^j dB for j < block (H, 2N, block); in the precision of the state, for
        they are many numbers to remember."""
        dA, dB = self.dense(rate)
        powers = [dB]
        for _ in range(block - 1):
            powers.append(torch.einsum("hmn,hn->hm", dA, powers[-1]))
        work = torch.promote_types(self.inv_dt.dtype, torch.float32)
        start, leap = (torch.linalg.matrix_power(dA, n).to(work) for n in (first, block))
        return start, leap, torch.stack(powers, -1).to(work)
