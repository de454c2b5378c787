"""Denoising diffusion: noise schedules, the forward process, training targets, ancestral sampling.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239 (equations 4, 7 and 14); the cosine
schedule of Nichol & Dhariwal, arXiv 2102.09672, equation 17; velocities of Salimans & Ho, arXiv 2202.00512. EEGDM runs
diffusers' ``DDPMScheduler`` with its defaults: predictions of the clean signal are clipped, the variance is the small
fixed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BETA_SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")
PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise a signal carries at each of the ``num_train_timesteps`` steps 0, 1, ...

    ``beta_schedule``: "squaredcos_cap_v2" (the cosine one, which ignores ``beta_start`` and ``beta_end``), "linear" or
    "scaled_linear". ``prediction_type``: what the network predicts, "v_prediction", "epsilon" or "sample".
    ``clip_sample``: predictions of the clean signal are clipped to +- ``clip_sample_range`` in :meth:`step`.
    Raises ValueError for other names and for no step.
    """

    num_train_timesteps: int = 50
    beta_start: float = 1e-4
    beta_end: float = 0.05
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "v_prediction"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    _betas: tuple[float, ...] = field(init=False, repr=False, default=())
    _kept: tuple[float, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; expected 1 or more")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule is {self.beta_schedule!r}; expected one of {', '.join(BETA_SCHEDULES)}")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}"
            )

        betas = self._made()
        # Numbers, not tensors: a tensor kept from a traced or a fake run would be of no use afterwards.
        object.__setattr__(self, "_betas", tuple(betas.tolist()))
        object.__setattr__(self, "_kept", tuple(torch.cumprod(1.0 - betas, dim=0).tolist()))

    def _made(self) -> Tensor:
        n = self.num_train_timesteps
        if self.beta_schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, n, dtype=torch.float32, device="cpu")
        if self.beta_schedule == "scaled_linear":
            root = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, n, dtype=torch.float32, device="cpu")
            return root**2

        def kept(share: float) -> float:
            return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

        values = [min(1 - kept((i + 1) / n) / kept(i / n), 0.999) for i in range(n)]
        return torch.tensor(values, dtype=torch.float32, device="cpu")

    @property
    def betas(self) -> Tensor:
        """(steps,) float32, on the CPU."""
        return torch.tensor(self._betas, dtype=torch.float32, device="cpu")

    @property
    def alphas_cumprod(self) -> Tensor:
        """(steps,) float32, on the CPU: the share of the signal's power at each step."""
        return torch.tensor(self._kept, dtype=torch.float32, device="cpu")

    def _shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of signal and noise at steps ``t`` (batch,) or (batch, 1), broadcast over ``like``."""
        kept = torch.tensor(self._kept, device=like.device, dtype=like.dtype)[t.flatten()].reshape(
            -1, *[1] * (like.dim() - 1)
        )
        return kept.sqrt(), (1 - kept).sqrt()

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The signal at steps ``t`` (batch, 1): sqrt(abar) x + sqrt(1 - abar) noise."""
        signal, rest = self._shares(t, x)
        return signal * x + rest * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) x."""
        signal, rest = self._shares(t, x)
        return signal * noise - rest * x

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict."""
        if self.prediction_type == "epsilon":
            return noise
        return x if self.prediction_type == "sample" else self.velocity(x, noise, t)

    def clean(self, prediction: Tensor, t: int, x: Tensor) -> Tensor:
        """The clean signal that a prediction at step ``t`` of the noisy ``x`` means, clipped."""
        kept = self._kept[self.checked(t)]
        signal, rest = kept**0.5, (1 - kept) ** 0.5
        if self.prediction_type == "sample":
            found = prediction
        elif self.prediction_type == "epsilon":
            found = (x - rest * prediction) / signal
        else:
            found = signal * x - rest * prediction
        return found.clamp(-self.clip_sample_range, self.clip_sample_range) if self.clip_sample else found

    def step(self, prediction: Tensor, t: int, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """One step back: x at ``t`` to x at ``t - 1``. ``noise``: standard normal, drawn if None; none at t = 0."""
        t = self.checked(t)
        kept = self._kept[t]
        before = self._kept[t - 1] if t > 0 else 1.0
        alpha = kept / before
        found = self.clean(prediction, t, x)
        mean = before**0.5 * (1 - alpha) / (1 - kept) * found + alpha**0.5 * (1 - before) / (1 - kept) * x
        if t == 0:
            return mean
        variance = max((1 - before) / (1 - kept) * (1 - alpha), 1e-20)
        return mean + variance**0.5 * (torch.randn_like(x) if noise is None else noise)

    def checked(self, t: int) -> int:
        """``t``; raises ValueError for a step that there is not."""
        if not 0 <= t < self.num_train_timesteps:
            raise ValueError(f"the step is {t}; expected 0 to {self.num_train_timesteps - 1}")
        return int(t)


@torch.no_grad()
def sample(
    model: nn.Module,
    schedule: NoiseSchedule,
    start: Tensor,
    cond: Tensor,
    *,
    last_step: int = 1,
    noises: Sequence[Tensor] | Tensor | None = None,
    generator: torch.Generator | None = None,
    each_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Signals from noise by ancestral sampling, ``start`` (batch, channels, length) and ``cond`` (batch, 1) class ids.

    ``last_step``: the authors stop after step 1 and never run step 0. ``noises``: those of the steps in order, drawn
    from ``generator`` if None. ``each_step``: called with the step that is done.
    """
    x = start
    steps = range(schedule.num_train_timesteps - 1, last_step - 1, -1)
    if noises is not None and len(noises) < len(steps):
        raise ValueError(f"{len(noises)} noises were given for {len(steps)} steps; give one for each")
    for i, t in enumerate(steps):
        at = torch.full((x.shape[0], 1), t, dtype=torch.long, device=x.device)
        if noises is not None:
            noise = noises[i]
        else:
            drawn_on = generator.device if generator is not None else x.device
            noise = torch.randn(x.shape, generator=generator, device=drawn_on, dtype=x.dtype).to(x.device)
        x = schedule.step(model(x, at, cond), t, x, noise)
        if each_step is not None:
            each_step(t)
    return x


def diffusion_loss(
    model: nn.Module,
    schedule: NoiseSchedule,
    x: Tensor,
    cond: Tensor,
    local_cond: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    t: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the prediction at random steps, for clean ``x`` and class ids ``cond`` (batch, 1)."""
    noise = torch.randn_like(x) if noise is None else noise
    if t is None:
        t = torch.randint(0, schedule.num_train_timesteps, (x.shape[0], 1), device=x.device)
    prediction = model(schedule.add_noise(x, noise, t), t, cond, local_cond)
    return nn.functional.mse_loss(prediction, schedule.target(x, noise, t))
