"""The convolutions of SpaceTime: companion and shift SSMs, the closed-loop decoder, fixed preprocessing kernels.

Source: Zhang et al., arXiv 2303.09489, section 3; HazyResearch/spacetime @ 7b7398c, Apache-2.0, ``model/ssm/*``.
Differs from the original: kernels of companions whose column is normalised by its 1-norm are made by generating
functions, not by powers of the matrix; in eval mode kernels are remembered until a parameter changes; the rollout is
made once for all samples; every layer has a state of fixed size and steps.

All of them take (batch, length, D). ``D = kernel_repeat * n_kernels * n_heads * head_dim`` and the kernel of a channel
is found by its place in that order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.precision import outside_autocast
from zoo.layers.ssm_kernel import Kept, wide
from zoo_kernels import kernel_spectrum, long_conv, long_conv_step

from .companion import companion_kernel, companion_matrix, krylov, last_state

#: Norms are left alone where their mean over all kernels is not above this (the original's threshold).
SMALL = 1e-4


def normalised(x: Tensor, order: float) -> Tensor:
    """Rows divided by their norm of this order, unless the mean of the norms is near 0. A zero row among others gives
    NaN, as in the original."""
    x = wide(x)
    size = torch.linalg.vector_norm(x, ord=order, dim=-1, keepdim=True)
    return x / torch.where(size.abs().mean() > SMALL, size, torch.ones_like(size))


class SSM(Kept):
    """A causal convolution of every channel with the kernel of its head, plus ``skip * u`` where wanted.

    ``head_dim`` given: ``n_heads`` follows from it; ``head_dim`` None: it follows from ``n_heads``. Subclasses make
    the kernels, (n_kernels, taps), and may have a recurrence of their own to step.
    """

    def __init__(
        self,
        model_dim: int,
        n_kernels: int,
        kernel_dim: int,
        kernel_repeat: int = 1,
        n_heads: int | None = None,
        head_dim: int | None = 1,
        skip_connection: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if n_heads is None:
                raise ValueError("n_heads and head_dim are both None; expected one of them")
            head_dim = model_dim // (kernel_repeat * n_kernels * n_heads)
        else:
            n_heads = model_dim // (kernel_repeat * n_kernels * head_dim)
        if kernel_repeat * n_kernels * n_heads * head_dim != model_dim:
            raise ValueError(
                f"model_dim is {model_dim}; expected kernel_repeat {kernel_repeat} x n_kernels {n_kernels} x n_heads "
                f"{n_heads} x head_dim {head_dim} = {kernel_repeat * n_kernels * n_heads * head_dim}"
            )
        self.model_dim, self.n_kernels, self.kernel_dim = model_dim, n_kernels, kernel_dim
        self.kernel_repeat, self.n_heads, self.head_dim = kernel_repeat, n_heads, head_dim
        self.skip_connection = skip_connection
        self.skip: Tensor | None = None

    def kernels(self, length: int) -> Tensor:
        """(n_kernels, taps); taps beyond ``length`` are not seen."""
        raise NotImplementedError

    def spread(self, kernels: Tensor) -> Tensor:
        """Something of each kernel (n_kernels, ...) to each channel (D, ...)."""
        heads = kernels.repeat_interleave(self.n_heads * self.head_dim, dim=0)
        return heads.repeat(self.kernel_repeat, *[1] * (heads.dim() - 1))

    def _ready(self, length: int) -> Any:
        kernels = self.spread(self.kernels(length))[:, :length]
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return kernels
        return kernel_spectrum(kernels, length)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, length, D) to the same shape."""
        length = u.shape[1]
        ready = self.kept(length, lambda: self._ready(length))
        return long_conv(u, ready, self.skip if self.skip_connection else None)[0]

    # -- one step at a time: by default of a finite kernel, whose state is the inputs before

    def init_state(self, batch: int, *, device=None, dtype=None) -> Tensor:
        """A state at rest: (batch, taps - 1, D), the inputs before, newest last."""
        taps = self._taps()
        return torch.zeros(batch, taps.shape[-1] - 1, self.model_dim, device=device or taps.device, dtype=dtype)

    def _taps(self) -> Tensor:
        return self.kept("taps", lambda: self.spread(self.kernels(self.kernel_dim)))

    def final_state(self, u: Tensor) -> Tensor:
        """The state after (batch, length, D) from rest."""
        taps = self._taps().shape[-1]
        recent = u[:, max(u.shape[1] - taps + 1, 0) :]
        return F.pad(recent, (0, 0, taps - 1 - recent.shape[1], 0)).clone()

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        """(batch, D) to (batch, D); ``state`` moves on in place."""
        return long_conv_step(u, self._taps(), self.skip if self.skip_connection else None, state=state)


class CompanionSSM(SSM):
    """``y_t = c^T x_t + skip u_t``, ``x_t = A x_{t-1} + b u_t`` with ``A = S + a e_d^T``; a normalised, b and c not.

    Parameters a, b, c: (n_kernels, d = kernel_dim); ``skip`` (D,), there whether used or not. ``norm_order``: of the
    norm of a; 0 or less: none. ``kernel_init``: "normal", or "xavier" (uniform within 1 / sqrt(d); the original stops
    with a NameError there). ``kernel_repeat``, ``kernel_weights``, ``kernel_train``, ``seed``: taken for the original's
    sake, which overrides or ignores them.
    """

    #: a and b are parameters; a shift SSM stores them as buffers.
    learns_ab = True

    def __init__(
        self,
        norm_order: float,
        model_dim: int,
        n_kernels: int,
        kernel_dim: int,
        n_heads: int | None = None,
        head_dim: int | None = 1,
        kernel_init: str = "normal",
        skip_connection: bool = False,
        kernel_repeat: int = 1,
        kernel_weights: Any = None,
        kernel_train: bool = True,
        seed: int = 42,
    ) -> None:
        super().__init__(model_dim, n_kernels, kernel_dim, 1, n_heads, head_dim, skip_connection)
        if kernel_dim < 1:
            raise ValueError(f"kernel_dim is {kernel_dim}; expected at least 1")
        self.norm_order = norm_order
        self.skip = nn.Parameter(torch.randn(model_dim))
        if self.learns_ab:
            self.a = nn.Parameter(self._draw(kernel_init))
            self.b = nn.Parameter(self._draw(kernel_init))
        else:
            self.register_buffer("a", torch.zeros(n_kernels, kernel_dim))
            self.register_buffer("b", F.pad(torch.ones(n_kernels, 1), (0, kernel_dim - 1)))
        self.c = nn.Parameter(self._draw(kernel_init))

    def _draw(self, kind: str) -> Tensor:
        shape = self.n_kernels, self.kernel_dim
        if kind == "normal":
            return torch.randn(shape)
        if kind == "xavier":
            bound = 1 / math.sqrt(self.kernel_dim)
            return torch.empty(shape).uniform_(-bound, bound)
        raise ValueError(f"kernel_init is {kind!r}; expected 'normal' or 'xavier'")

    def _maybe(self, x: Tensor) -> Tensor:
        return normalised(x, self.norm_order) if self.norm_order > 0 else wide(x)

    @property
    def bounded(self) -> bool:
        """True where the 1-norm of the column is at most 1 whatever the parameters are."""
        return 0 < self.norm_order <= 1

    def column(self) -> Tensor | None:
        """The last column of A (n_kernels, d); None: A is the bare shift matrix."""
        return self._maybe(self.a)

    def responses(self, length: int, b: Tensor, c: Tensor) -> Tensor:
        """``c^T A^i b`` for i < length: (n_kernels, length) in float32 or better."""
        a = self.column()
        if a is None or self.bounded:
            return companion_kernel(length, a, b, c)
        return krylov(length, companion_matrix(a), wide(b), wide(c))

    def kernels(self, length: int) -> Tensor:
        return self.responses(length, self.b, self.c)

    def init_state(self, batch: int, *, device=None, dtype=None) -> Tensor:
        """A state at rest: (batch, D, d), in float32 or better."""
        like = wide(self.b)
        shape = batch, self.model_dim, self.kernel_dim
        return torch.zeros(shape, device=device or like.device, dtype=dtype or like.dtype)

    def final_state(self, u: Tensor) -> Tensor:
        with outside_autocast(u):
            a = self.column()
            b = self.spread(self.b)
            if a is None or self.bounded:
                return last_state(u, None if a is None else self.spread(a), b)
            x = wide(u)
            columns = self.spread(krylov(x.shape[1], companion_matrix(a), wide(self.b)))
            return torch.einsum("blh,hnl->bhn", x.flip(1), columns)

    def advance(self, u: Tensor, state: Tensor) -> None:
        """``state = A state + b u`` in place, for u (batch, D)."""
        a = self.column()
        moved = F.pad(state[..., :-1], (1, 0)) + self.spread(self.b) * u[..., None]
        if a is not None:
            moved = moved + self.spread(a) * state[..., -1:]
        state.copy_(moved)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        self.advance(u, state)
        y = (state * self.spread(self.c)).sum(-1)
        if self.skip_connection:
            assert self.skip is not None
            y = y + self.skip * u
        return y.to(u.dtype)


class ShiftSSM(CompanionSSM):
    """A companion whose a (0) and b (the first unit vector) are stored, not learned: a FIR filter of d taps c.

    As in the original the kernel is that of the stored a and b, whatever they are.
    """

    learns_ab = False


class ClosedLoopCompanionSSM(CompanionSSM):
    """The decoder: the state after the lag window, rolled out with its own predictions of its input.

    ``x_{h+1} = (A + b k^T) x_h`` from the state after the last input, outputs ``y_h = c^T x_h`` and inputs of the next
    step ``u_h = k^T x_h`` (k not normalised there); with ``norm_order`` above 0 the b, k and c of the rollout are
    normalised, the b that made the state is not; at 0 or below the original uses b in the place of k in the matrix, and
    so does this. Parameters a, b, c, k: (n_kernels, d); n_kernels must be D (or 1, shared by all channels).
    """

    def __init__(self, lag: int = 1, horizon: int = 1, use_initial: bool = False, **arguments: Any) -> None:
        super().__init__(**{**arguments, "skip_connection": False})
        if self.n_kernels not in (1, self.model_dim):
            raise ValueError(
                f"a closed-loop decoder of {self.model_dim} channels has n_kernels {self.n_kernels}; expected one "
                "kernel for each channel: its rollout does not repeat kernels over heads"
            )
        self.lag, self.horizon, self.use_initial = lag, horizon, use_initial
        self.k = nn.Parameter(self._draw(arguments.get("kernel_init", "normal")))

    def _loop(self) -> Tensor:
        """``A + b k^T`` (n_kernels, d, d)."""
        a = self.column()
        A = companion_matrix(torch.zeros_like(wide(self.a)) if a is None else a)
        b = self._maybe(self.b)
        k = self._maybe(self.k) if self.norm_order > 0 else b
        return A + b.unsqueeze(-1) * k.unsqueeze(-2)

    def _rows(self, horizon: int) -> Tensor:
        """``c^T (A + b k^T)^h`` as columns: (D, d, horizon). It does not depend on the inputs."""
        return self.spread(krylov(horizon, self._loop().transpose(-1, -2), self._maybe(self.c)))

    def roll_out(self, state: Tensor, horizon: int) -> Tensor:
        """Outputs y_0 .. y_{horizon-1}, (batch, horizon, D), from a state (batch, D, d)."""
        with outside_autocast(state):
            if self.training or torch.is_grad_enabled():
                rows = self._rows(horizon)
            else:  # one memory for every horizon up to the model's own: it is the largest thing that is kept
                longest = max(horizon, self.horizon)
                rows = self.kept(("rows", longest), lambda: self._rows(longest))[..., :horizon]
            return (state.to(rows.dtype).transpose(0, 1) @ rows).permute(1, 2, 0)

    def next_inputs(self, state: Tensor, horizon: int) -> Tensor:
        """The decoder's own next inputs ``u_h = k^T x_h`` along the rollout, (batch, horizon, D)."""
        with outside_autocast(state):
            columns = self.spread(krylov(horizon, self._loop().transpose(-1, -2), wide(self.k)))
            return (state.to(columns.dtype).transpose(0, 1) @ columns).permute(1, 2, 0)

    def forward(self, u: Tensor) -> Tensor:
        """Closed loop: (batch, lag, D) to (batch, horizon, D)."""
        return self.roll_out(self.final_state(u), self.horizon).to(u.dtype)

    def open_loop(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Over the lag window: the outputs, and the predictions of the next input; (batch, lag, D) each."""
        with outside_autocast(u):
            b, length = self._maybe(self.b), u.shape[1]
            y = self.responses(length, b, self._maybe(self.c))
            # k by norm_order itself, also where nothing else is normalised: order 0 counts the entries that are not 0.
            k = self.responses(length, b, normalised(self.k, self.norm_order))
        return long_conv(u, self.spread(y))[0], long_conv(u, self.spread(k))[0]


class ClosedLoopShiftSSM(ClosedLoopCompanionSSM):
    """A closed-loop decoder with the bare shift matrix (its stored a is not read) and a stored b."""

    learns_ab = False

    def column(self) -> Tensor | None:
        return None


SSMS: dict[str, type[CompanionSSM]] = {
    "companion": CompanionSSM,
    "shift": ShiftSSM,
    "closed_loop_companion": ClosedLoopCompanionSSM,
    "closed_loop_shift": ClosedLoopShiftSSM,
}


# -- preprocessing: fixed kernels before the first block ---------------------------------------------------------------


def differences(orders: int) -> Tensor:
    """Row j: the signed binomials of the j-th difference, (1), (1, -1), (1, -2, 1) ...; (orders, orders)."""
    return torch.tensor([[float((-1) ** i * math.comb(j, i)) for i in range(orders)] for j in range(orders)])


class Preprocessing(SSM):
    """A fixed kernel for each channel, stored as buffers. ``n_heads``, ``kernel_weights``, ``kernel_init``,
    ``kernel_train``, ``skip_connection``, ``seed``: taken for the original's sake, which overrides or ignores them."""

    def __init__(
        self,
        model_dim: int,
        n_kernels: int,
        kernel_dim: int,
        kernel_repeat: int,
        n_heads: int = 1,
        head_dim: int | None = 1,
        kernel_weights: Any = None,
        kernel_init: Any = None,
        kernel_train: bool = False,
        skip_connection: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__(model_dim, n_kernels, kernel_dim, kernel_repeat, 1, head_dim, False)


class Differencing(Preprocessing):
    """Differences of order 0 .. max_diff_order - 1 in turn. Buffer ``kernel`` (n_kernels, kernel_dim)."""

    def __init__(self, max_diff_order: int = 4, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.kernel_dim < max_diff_order:
            raise ValueError(f"kernel_dim is {self.kernel_dim}; expected at least max_diff_order {max_diff_order}")
        rows = differences(max_diff_order)[torch.arange(self.n_kernels) % max_diff_order]
        self.register_buffer("kernel", F.pad(rows, (0, self.kernel_dim - max_diff_order)))

    def kernels(self, length: int) -> Tensor:
        return self.kernel  # type: ignore[return-value]


class MovingAverageResidual(Preprocessing):
    """Meant to subtract moving averages; the original throws the subtraction away, and its kernel is the identity.

    Buffer ``kernel`` (n_kernels, kernel_dim), which is convolved with as it is stored; parameter ``ma_window``
    (1, n_kernels) without effect.
    """

    def __init__(self, min_avg_window: int = 4, max_avg_window: int = 720, **arguments: Any) -> None:
        super().__init__(**arguments)
        windows = torch.randint(min_avg_window, max_avg_window, (1, self.n_kernels)).float()
        self.ma_window = nn.Parameter(windows)
        self.register_buffer("kernel", F.pad(torch.ones(self.n_kernels, 1), (0, self.kernel_dim - 1)))

    def kernels(self, length: int) -> Tensor:
        return self.kernel  # type: ignore[return-value]


class Residual(Preprocessing):
    """Differences, and residuals from moving averages over random windows, drawn once.

    Buffers ``diff_kernel`` (kernel_repeat * orders, orders) and ``ma_r_kernel`` (kernel_repeat * (n_kernels - orders),
    max_avg_window): ``delta - 1 / w`` on the first w taps. They alternate in every repeat: orders differences, then
    that repeat's averages.
    """

    def __init__(
        self,
        max_diff_order: int = 4,
        min_avg_window: int = 4,
        max_avg_window: int = 720,
        n_kernels: int = 8,
        kernel_repeat: int = 16,
        **arguments: Any,
    ) -> None:
        super().__init__(n_kernels=n_kernels, kernel_repeat=kernel_repeat, **arguments)
        if self.n_heads != 1:
            raise ValueError(
                f"model_dim is {self.model_dim}; expected kernel_repeat {kernel_repeat} x n_kernels {n_kernels} x "
                f"head_dim {self.head_dim}: these kernels are not repeated over heads"
            )
        averages = (n_kernels - max_diff_order) * kernel_repeat
        if averages < 0:
            raise ValueError(f"n_kernels is {n_kernels}; expected at least max_diff_order {max_diff_order}")
        windows = torch.randint(min_avg_window, max_avg_window, (averages, 1))
        inside = torch.arange(max_avg_window) < windows
        residual = F.pad(torch.ones(averages, 1), (0, max_avg_window - 1)) - inside / windows
        self.register_buffer("diff_kernel", differences(max_diff_order).repeat(kernel_repeat, 1))
        self.register_buffer("ma_r_kernel", residual)

    def kernels(self, length: int) -> Tensor:
        parts: list[Tensor] = [self.diff_kernel, self.ma_r_kernel]  # type: ignore[list-item]
        taps = max(p.shape[-1] for p in parts)
        rows = [F.pad(p, (0, taps - p.shape[-1])).unflatten(0, (self.kernel_repeat, -1)) for p in parts if len(p)]
        return torch.cat(rows, dim=1)

    def spread(self, kernels: Tensor) -> Tensor:
        return kernels.flatten(0, 1).repeat_interleave(self.head_dim, dim=0)


PREPROCESSING: dict[str, type[Preprocessing]] = {
    "differencing": Differencing,
    "ma_residual": MovingAverageResidual,
    "residual": Residual,
}
