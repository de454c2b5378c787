"""What the convolution kernels of the S4 family share: parameters under transforms, caches, the recurrent protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import hippo
from .precision import outside_autocast

TRANSFORMS = ("none", "exp", "relu", "sigmoid", "softplus")


def positive(x: Tensor, transform: str) -> Tensor:
    """A positive quantity from its free parameter."""
    if transform == "none":
        return x
    if transform == "exp":
        return torch.exp(x)
    if transform == "relu":
        return F.relu(x) + 1e-4
    if transform == "sigmoid":
        return torch.sigmoid(x)
    if transform == "softplus":
        return F.softplus(x)
    raise ValueError(f"transform is {transform!r}; expected one of {', '.join(TRANSFORMS)}")


def free(x: Tensor, transform: str) -> Tensor:
    """The inverse of :func:`positive`, of values clamped to at least 1e-4."""
    x = x.clamp(min=1e-4)
    if transform in ("none", "relu"):
        return x
    if transform == "exp":
        return torch.log(x)
    if transform == "sigmoid":
        return torch.logit(x)
    if transform == "softplus":
        return x + torch.log(-torch.expm1(-x))
    raise ValueError(f"transform is {transform!r}; expected one of {', '.join(TRANSFORMS)}")


def as_complex(pairs: Tensor) -> Tensor:
    """Complex numbers from real pairs (last axis 2), in single precision or better."""
    return torch.view_as_complex(pairs.to(torch.promote_types(pairs.dtype, torch.float32)).contiguous())


def wide(x: Tensor) -> Tensor:
    """Half precision as float32: what powers and exponentials are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exact(x: Tensor) -> Tensor:
    """In double precision, where the device has it: for exponents, whose phase grows with the length."""
    if x.device.type == "mps":
        return wide(x)
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _plain(t: Tensor) -> bool:
    """Whether a tensor is one of numbers in memory: not traced, not without storage, not of a library's own kind."""
    return (
        type(t) in (Tensor, nn.Parameter)
        and not t.is_meta
        and not t.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)  # type: ignore[attr-defined]
    )


def _stamp(tensors: list[Tensor]) -> tuple[Any, ...]:
    return tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)


def _on_cpu(tensors: list[Tensor]) -> bool:
    return not tensors or tensors[0].device.type == "cpu"


def _numbers(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of all numbers: a tensor for each on a CPU; elsewhere, where every call costs, one of all their bytes."""
    if _on_cpu(tensors):
        return [t.detach().clone() for t in tensors]
    return [_bytes(tensors)]


def _bytes(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().contiguous().resolve_conj().flatten().view(torch.uint8) for t in tensors])


def _unchanged(kept: list[Tensor], tensors: list[Tensor]) -> bool:
    """Whether all numbers are those of :func:`_numbers`; asks a device once."""
    if _on_cpu(tensors):
        return all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))
    if tensors[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True  # a graph that is being recorded cannot ask, and holds what it was recorded with anyway
    return torch.equal(kept[0], _bytes(tensors))


class Kept(nn.Module):
    """A module that remembers what it computes from its own parameters alone (kernels, transforms, powers)."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Any, Any] = {}
        self._made_of: tuple[tuple[Any, ...], list[Tensor]] | None = None

    def remembers(self) -> bool:
        """Whether :meth:`kept` remembers now: in eval mode without gradients, outside compilation and tracing."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if torch._C._len_torch_dispatch_stack() > 0:  # FakeTensorMode, make_fx: results of theirs are no numbers
            return False
        return all(map(_plain, self._own()))

    def _own(self) -> list[Tensor]:
        # Not by parameters(), which takes longer than all else that a step asks before it computes.
        return [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None]

    def kept(self, key: Any, make: Any, *, watch: bool = True) -> Any:
        """``make()``, outside autocast, remembered (see :meth:`remembers`) until a parameter is written to or replaced.

        ``watch``: compare the parameters' numbers, too, which shows what is written through ``.data``; without it (for
        what is asked for at every step) only replaced tensors and counted writes are seen.
        """
        if not self.remembers():
            return self._made(make)
        self.forget_changed(watch)
        found = self._kept.pop(key, None)  # and to the end: the one that was not used for longest goes first
        if found is None:
            found = self._made(make)
            for oldest in list(self._kept)[:-3]:  # a list, for another thread may add to it meanwhile
                self._kept.pop(oldest, None)
        self._kept[key] = found
        return found

    def _made(self, make: Any) -> Any:
        with outside_autocast(self._own()[0]):
            return make()

    def forget_changed(self, watch: bool = True) -> None:
        """Forget everything if a parameter has changed since it was remembered; ``watch`` as for :meth:`kept`."""
        tensors = self._own()
        stamp = _stamp(tensors)
        if self._made_of is None or self._made_of[0] != stamp or (watch and not _unchanged(self._made_of[1], tensors)):
            self._kept.clear()
            self._made_of = stamp, _numbers(tensors)

    def _forget(self) -> None:
        self._kept.clear()
        self._made_of = None

    def train(self, mode: bool = True) -> Kept:
        self._forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_made_of": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)


class ConvolutionKernel(Kept):
    """Makes the kernels of a long convolution: ``(channels, d_model, length)``.

    Subclasses implement :meth:`forward`; those with a recurrence also :meth:`init_state`, :meth:`step` and
    :meth:`final_state`, and :meth:`response` where that alone costs less than both. ``lr`` is as in the original: a
    number, or a mapping from {"dt", "A", "B", "C", "P", "K"}; 0 makes a buffer of the parameter, another number is left
    for an optimiser in the parameter's ``_optim``.
    """

    recurrent = False

    def __init__(
        self, d_model: int, channels: int = 1, l_max: int | None = None, lr: float | Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.d_model, self.channels, self.l_max, self.lr = d_model, channels, l_max, lr

    def add(self, name: str, tensor: Tensor, group: str, weight_decay: float | None = 0.0) -> None:
        """Register a parameter, or a buffer where its learning rate is 0."""
        rate = self.lr.get(group) if isinstance(self.lr, Mapping) else self.lr
        if rate == 0.0:
            self.register_buffer(name, tensor)
            return
        parameter = nn.Parameter(tensor)
        options = {"lr": rate, "weight_decay": weight_decay}
        parameter._optim = {k: v for k, v in options.items() if v is not None}  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)

    def forward(self, length: int, rate: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The kernels (channels, d_model, length), and what ``state`` adds to the output: (batch, channels, d_model,
        length) or None. ``rate``: relative sampling step (2 = every second sample)."""
        raise NotImplementedError

    def has_length(self, length: int, rate: float = 1.0) -> bool:
        """Whether :meth:`forward` gives as many taps as it is asked for."""
        return True

    def init_state(self, batch: int, *, device=None, dtype=None) -> Tensor:
        raise ValueError(f"{type(self).__name__} has no recurrent form; it cannot step")

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        raise ValueError(f"{type(self).__name__} has no recurrent form; it cannot step")

    def response(self, state: Tensor, length: int, rate: float = 1.0) -> Tensor:
        """What ``state`` alone adds to the output: (batch, channels, d_model, length)."""
        found = self(length, rate, state)[1]
        if found is None:
            raise ValueError(f"{type(self).__name__} has no recurrent form; it cannot carry a state")
        return found

    def final_state(self, u: Tensor, state: Tensor, rate: float = 1.0) -> Tensor:
        """The state after u (batch, length, d_model), sampled at ``rate``, from ``state``."""
        raise ValueError(f"{type(self).__name__} has no recurrent form; it cannot carry a state")


class SSMKernel(ConvolutionKernel):
    """Parameters of a (diagonal, or diagonal plus low-rank) state-space model in continuous time.

    ``n_ssm`` S independent (A, B) are shared by ``d_model`` H channels (copy index outer), ``d_state`` is twice the
    number N of complex modes that are stored. Parameters: ``inv_dt`` (H, 1) or, without ``dt_tie``, (H, N);
    ``A_real``, ``A_imag`` (S, N); ``B`` (1, S, N, 2); ``C`` (channels, H, N, 2); with ``is_real`` A_real (S, N),
    B (1, S, N), C (channels, H, N).
    """

    recurrent = True

    def __init__(
        self,
        d_model: int,
        channels: int = 1,
        l_max: int | None = None,
        lr: float | Mapping[str, float] | None = None,
        *,
        d_state: int = 64,
        init: str | list[str] = "legs",
        n_ssm: int | None = None,
        rank: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: str = "exp",
        dt_fast: bool = False,
        real_transform: str = "exp",
        imag_transform: str = "none",
        bandlimit: float | None = None,
        is_real: bool = False,
        low_rank: bool = False,
        device=None,
        dtype=None,
        **init_args: Any,
    ) -> None:
        super().__init__(d_model, channels, l_max, lr)
        S = d_model if n_ssm is None else n_ssm
        if S < 1 or d_model % S:
            raise ValueError(f"n_ssm is {n_ssm}; it must divide d_model {d_model}")
        self.d_state, self.n_ssm, self.rank = d_state, S, rank
        self.dt_transform, self.dt_fast, self.bandlimit, self.is_real = dt_transform, dt_fast, bandlimit, is_real
        self.real_transform, self.imag_transform = real_transform, imag_transform
        kind = {"device": device, "dtype": dtype}
        # A real-valued system keeps d_state real modes instead of half as many complex ones.
        A, P, B = hippo.combination(init, 2 * d_state if is_real else d_state, rank, S, **init_args)
        N = A.shape[-1]
        self.modes = N
        spread = torch.empty(d_model, 1 if dt_tie else N, **kind).uniform_(math.log(dt_min), math.log(dt_max))
        if dt_transform != "exp":
            spread = free(spread.exp(), dt_transform)
        self.add("inv_dt", torch.asinh(spread) if dt_fast else spread, "dt")
        start = lambda x: torch.tensor(x, **kind if dtype else {"device": device, "dtype": torch.get_default_dtype()})  # noqa: E731
        pair = lambda x: torch.stack([start(x.real), start(x.imag)], -1)  # noqa: E731
        self.add("A_real", free(start(-A.real), real_transform), "A")
        if is_real:
            self.add("B", start(B.real[None]), "B")
            self.add("C", torch.randn(channels, d_model, N, **kind) * 2**-0.5, "C", None)
        else:
            self.add("A_imag", free(start(-A.imag), imag_transform), "A")
            self.add("B", pair(B[None]), "B")
            self.add("C", torch.randn(channels, d_model, N, 2, **kind) * 2**-0.5, "C", None)
        if low_rank:
            self.add("P", pair(P), "A")

    def system(self, rate: float = 1.0, *, double: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (H, 1 or N) and, complex, A (H, N), B (1, H, N), C (channels, H, N); real if ``is_real``.

        ``double``: dt and A in double precision.
        """
        enough = exact if double else wide
        A = -positive(enough(self.A_real), self.real_transform)
        if self.is_real:
            B, C = wide(self.B), wide(self.C)
        else:
            A = torch.complex(A, -positive(enough(self.A_imag), self.imag_transform))
            B, C = as_complex(self.B), as_complex(self.C)
        inv_dt = enough(self.inv_dt)
        free_dt = torch.sinh(inv_dt) if self.dt_fast else inv_dt
        dt = positive(free_dt, self.dt_transform) * rate
        copies = self.d_model // self.n_ssm
        A, B = A.repeat(copies, 1), B.repeat(1, copies, 1)
        C = self.band(C, dt / rate, A)
        return dt, A, B, C

    def band(self, C: Tensor, dt: Tensor, A: Tensor) -> Tensor:
        """C without the modes above the band limit (cycles per step at rate 1, times 2)."""
        if self.bandlimit is None or not A.is_complex():
            return C
        return C * (dt * A.imag.abs() / (2 * math.pi) < self.bandlimit / 2)

    def init_state(self, batch: int, *, device=None, dtype=None) -> Tensor:
        """(batch, d_model, modes) zeros, complex unless the system is real."""
        if self.remembers():  # steps do not watch their constants: here is the last chance to see that they changed
            self.forget_changed()
        real = torch.promote_types(self.inv_dt.dtype if dtype is None else dtype, torch.float32)
        kind = real if self.is_real else real.to_complex()
        return torch.zeros(
            batch, self.d_model, self.modes, dtype=kind, device=self.inv_dt.device if device is None else device
        )
