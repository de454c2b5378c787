"""UniAnimate's diffusion: the schedule, v prediction, the training loss, DDIM with guidance, windows for long videos.

Order of reading: schedule, loss, windows, sampling.

Source: arXiv 2406.01188; ali-vilab/UniAnimate @ 643c963 ``tools/modules/diffusions/{schedules,diffusion_ddim}.py``;
zero terminal SNR: Lin et al., arXiv 2305.08891, algorithm 1; v prediction: Salimans and Ho, arXiv 2202.00512.
Differs from the original: DDIM's noise is taken from v directly, sqrt(1 - abar) x + sqrt(abar) v, which is the same and
holds at the last step too, where abar is 0; conditions are encoded once for all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .unet import Conditions, UNet

STEPS = 1000
GUIDANCE = 2.5
PRIOR, PRIOR_LONG = 949, 939  #: the step whose noise the reference's latent gets at the start; of long videos
OFFSET = 0.1  #: of the noise that all pixels of a frame and channel share


# -- the schedule


def betas(steps: int = STEPS, first: float = 0.00085, last: float = 0.012, *, zero_terminal_snr: bool = True) -> Tensor:
    """(steps,) float64: squares of evenly spaced roots; rescaled so that the last step is noise alone."""
    plain = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    if not zero_terminal_snr:
        return plain
    root = (1 - plain).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    kept = root**2
    return 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])


class Schedule:
    """sqrt(abar) and sqrt(1 - abar) of every step, in float64."""

    def __init__(self, steps: int = STEPS, *, zero_terminal_snr: bool = True) -> None:
        self.betas = betas(steps, zero_terminal_snr=zero_terminal_snr)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.signal, self.noise = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.steps = steps

    def at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(abar), sqrt(1 - abar)) of t, an int or (batch,), shaped to multiply ``like``."""
        index = torch.as_tensor(t).cpu().reshape(-1)
        shape = (-1, *[1] * (like.dim() - 1))
        return self.signal[index].view(shape).to(like), self.noise[index].view(shape).to(like)

    def noised(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """q(x_t | x_0): sqrt(abar) x0 + sqrt(1 - abar) noise."""
        a, s = self.at(t, x0)
        return a * x0 + s * noise


def offset_noise(like: Tensor, strength: float = OFFSET, generator: torch.Generator | None = None) -> Tensor:
    """N(0, 1) in the shape of (batch, c, frames, h, w), plus strength * N(0, 1) for each (batch, c, frame)."""
    kind = {"generator": generator, "device": like.device, "dtype": like.dtype}
    noise = torch.randn(like.shape, **kind)  # type: ignore[call-overload]
    shared = torch.randn(*like.shape[:3], 1, 1, **kind)  # type: ignore[call-overload]
    return noise + strength * shared


def training_loss(
    model: Callable[..., Tensor],
    x0: Tensor,
    t: Tensor,
    conditions: Mapping[str, Tensor | None],
    *,
    schedule: Schedule,
    noise: Tensor | None = None,
) -> Tensor:
    """Squared error of the predicted v = sqrt(abar) noise - sqrt(1 - abar) x0, a mean for each sample, (batch,).

    x0 (batch, 4, frames, h, w), t (batch,). noise: None draws :func:`offset_noise`.
    """
    noise = offset_noise(x0) if noise is None else noise
    a, s = schedule.at(t, x0)
    predicted = model(a * x0 + s * noise, t, **conditions)
    return (predicted - (a * noise - s * x0)).square().flatten(1).mean(1)


# -- long videos


def windows(frames: int, size: int = 32, overlap: int = 8, stride: int = 1) -> list[list[int]]:
    """Frame numbers of the windows that are denoised one by one: starts 0, size - overlap, ...; the last window is
    the last ``size`` frames. All frames in one window where there are no more than ``size``.

    stride: also windows of every 2nd, 4th ... frame, up to 2^(stride - 1), before the replaced last one.
    """
    if size < 1 or not 0 <= overlap < size or stride < 1:
        raise ValueError(
            f"windows of {size} frames overlap by {overlap}, stride {stride}; expected 0 <= overlap < size"
        )
    if frames <= size:
        return [list(range(frames))]
    stride = min(stride, math.ceil(math.log2(frames / size)) + 1)
    found = []
    for step in (1 << i for i in range(stride)):
        for start in range(0, frames - overlap, size * step - overlap):
            found.append([e % frames for e in range(start, start + size * step, step)])
    found[-1] = [e % frames for e in range(frames - size * stride, frames, stride)]
    return found


# -- sampling


def timesteps(count: int, steps: int = STEPS) -> tuple[list[int], int]:
    """The steps of a sampling from the noisiest, and their stride. ``count`` 30 gives 31 of them, from 991."""
    if not 1 <= count <= steps:
        raise ValueError(f"a sampling of {count} steps is asked for; expected 1 to {steps}")
    stride = steps // count
    return [min(1 + i, steps - 1) for i in range(0, steps, stride)][::-1], stride


def starting_noise(
    schedule: Schedule,
    randomref: Tensor,
    *,
    prior: int | None = PRIOR,
    strength: float = OFFSET,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Where a sampling starts: the reference's latent in every frame, noised to the step ``prior``, and offset noise.

    randomref (batch, 4, frames, h, w). prior: None starts from noise alone.
    """
    kind = {"generator": generator, "device": randomref.device, "dtype": randomref.dtype}
    noise = torch.randn(randomref.shape, **kind)  # type: ignore[call-overload]
    start = noise if prior is None else schedule.noised(randomref, prior, noise)
    return start + strength * torch.randn(*randomref.shape[:3], 1, 1, **kind)  # type: ignore[call-overload]


@torch.no_grad()
def sample(
    model: UNet,
    noise: Tensor,
    conditions: Mapping[str, Tensor | None],
    *,
    schedule: Schedule,
    count: int = 30,
    guidance: float | None = GUIDANCE,
    size: int = 32,
    overlap: int = 8,
    eta: float = 0.0,
    fps: Tensor | None = None,
    zero_y: Tensor | None = None,
    generator: torch.Generator | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Tensor:
    """DDIM from ``noise`` (batch, 4, frames, h, w) to latents of the same shape.

    conditions: those of :meth:`UNet.encode` by name. guidance: u + guidance (c - u), where u is predicted with every
    condition None; None or 1: c alone. size, overlap: see :func:`windows`; v of frames in several windows is averaged.
    eta: DDIM's noise. report(step number, steps): called after every step. The network computes in its own dtype, all
    else is in that of ``noise``.
    """
    batch, frames = noise.shape[0], noise.shape[2]
    pieces = windows(frames, size, overlap)
    encoded = [_encode(model, noise, conditions, piece, zero_y) for piece in pieces]
    guided = guidance is not None and guidance != 1
    empty = model.encode(_size(noise, len(pieces[0])), zero_y=zero_y) if guided else None
    counts = torch.zeros(frames, dtype=noise.dtype, device=noise.device)
    for piece in pieces:
        counts[piece] += 1
    counts = counts.view(1, 1, -1, 1, 1)
    x = noise
    steps, stride = timesteps(count, schedule.steps)
    dtype = next((p.dtype for p in model.parameters()), x.dtype)
    for number, step in enumerate(steps):
        t = torch.full((batch,), step, device=noise.device)
        v = torch.zeros_like(x)
        for piece, given in zip(pieces, encoded, strict=True):
            part = (x if len(pieces) == 1 else x[:, :, piece]).to(dtype)
            c = model(part, t, fps=fps, conditions=given).to(x.dtype)
            if guided:
                assert guidance is not None
                u = model(part, t, conditions=empty).to(x.dtype)
                c = u + guidance * (c - u)
            v[:, :, piece] += c
        x = _ddim_step(schedule, x, v / counts, step, max(step - stride, 0), eta, generator)
        if report is not None:
            report(number + 1, len(steps))
    return x


def _ddim_step(
    schedule: Schedule, x: Tensor, v: Tensor, step: int, before: int, eta: float, generator: torch.Generator | None
) -> Tensor:
    a, s = schedule.at(step, x)
    x0, noise = a * x - s * v, s * x + a * v
    if eta == 0:
        return schedule.noised(x0, before, noise)
    abar, past = float(schedule.alphas_cumprod[step]), float(schedule.alphas_cumprod[before])
    sigma = eta * math.sqrt(max((1 - past) / (1 - abar) * (1 - abar / past), 0.0))
    fresh = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return math.sqrt(past) * x0 + math.sqrt(max(1 - past - sigma**2, 0.0)) * noise + sigma * fresh


def _size(noise: Tensor, frames: int) -> Sequence[int]:
    return (noise.shape[0], noise.shape[1], frames, *noise.shape[3:])


def _encode(
    model: UNet, noise: Tensor, conditions: Mapping[str, Tensor | None], piece: list[int], zero_y: Tensor | None
) -> Conditions:
    """The conditions of the frames ``piece`` of a video."""
    given: dict[str, Tensor | None] = dict(conditions)
    if (poses := given.get("dwpose")) is not None:
        first = [0] if "randomref_pose" in model.video_compositions else []
        given["dwpose"] = poses[:, :, first + [i + len(first) for i in piece]]
    if (image := given.get("local_image")) is not None:
        given["local_image"] = image[:, :, piece]
    return model.encode(_size(noise, len(piece)), **given, zero_y=zero_y)  # type: ignore[arg-type]
