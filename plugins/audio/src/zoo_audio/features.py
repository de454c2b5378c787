"""Log-mel features of speech, for a whole recording at once or as the samples come.

The mel filters and the default scaling are those of Whisper's front end (slaney mel scale, area-normalised triangles),
which the public speech models of this size share.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The floor of "fixed" scaling reaches this many decades below what a full-scale tone gives in one band.
FULL_SCALE = 2.0
DECADES = 8.0


def mel_filters(n_mels: int, n_fft: int, rate: int, low: float = 0.0, high: float | None = None) -> np.ndarray:
    """Triangles (n_fft / 2 + 1, n_mels) on the slaney scale (linear to 1 kHz, then logarithmic), each of area 1.

    Source: Slaney, "Auditory Toolbox", Interval Research 1998-010.
    """
    high = rate / 2 if high is None else high
    step, knee, log_step = 200 / 3, 1000.0, math.log(6.4) / 27

    def to_mel(hertz: float) -> float:
        return hertz / step if hertz < knee else knee / step + math.log(hertz / knee) / log_step

    mels = np.linspace(to_mel(low), to_mel(high), n_mels + 2)
    linear, above = mels * step, knee * np.exp(log_step * (mels - knee / step))
    edges = np.where(mels < knee / step, linear, above)
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))


class LogMel(nn.Module):
    """Samples (batch, length) in [-1, 1] to features (batch, frames, n_mels), length / hop frames.

    A frame is the power spectrum of a Hann window of ``n_fft`` samples centred on every ``hop``-th sample (the ends are
    mirrored), as log10 of mel bands. ``scaling`` "utterance": clamped to 8 decades below the loudest value of the
    recording, as in Whisper; this looks at the whole recording. "fixed": clamped to 8 decades below full scale, which a
    causal model needs. Both end with (x + 4) / 4. Computed in float32. No parameters.
    """

    def __init__(
        self, n_mels: int = 80, *, rate: int = 16000, n_fft: int = 400, hop: int = 160, scaling: str = "utterance"
    ) -> None:
        super().__init__()
        if scaling not in ("utterance", "fixed"):
            raise ValueError(f"scaling is {scaling!r}; expected 'utterance' or 'fixed'")
        self.n_mels, self.rate, self.n_fft, self.hop, self.scaling = n_mels, rate, n_fft, hop, scaling
        filters = torch.tensor(mel_filters(n_mels, n_fft, rate), dtype=torch.float32)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def frames(self, samples: int) -> int:
        """How many frames ``samples`` samples give."""
        return samples // self.hop

    def forward(self, audio: Tensor, lengths: Tensor | None = None) -> Tensor:
        """lengths: (batch,) samples that count; frames behind a recording's end are zeros. A recording shorter than
        half a window is followed by silence first."""
        if lengths is not None:
            pieces = [self.forward(audio[i : i + 1, : int(n)])[0] for i, n in enumerate(lengths)]
            return nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        half, count = self.n_fft // 2, self.frames(audio.shape[-1])
        audio = F.pad(audio, (0, max(0, half + 1 - audio.shape[-1])))
        mirrored = F.pad(audio[:, None], (half, half), mode="reflect")[:, 0]
        return self.scale(self.bands(mirrored)[:, :count])

    def bands(self, padded: Tensor) -> Tensor:
        """log10 of the mel bands of every whole window in ``padded`` (batch, samples): (batch, windows, n_mels)."""
        windows = padded.float().unfold(-1, self.n_fft, self.hop) * self.window
        power = torch.fft.rfft(windows, dim=-1).abs().square()
        return torch.log10((power @ self.filters).clamp(min=1e-10))

    def scale(self, bands: Tensor) -> Tensor:
        if self.scaling == "utterance":
            floor = bands.amax(dim=(1, 2), keepdim=True) - DECADES if bands.shape[1] else bands.new_zeros(1, 1, 1)
        else:
            floor = torch.full((), FULL_SCALE - DECADES, device=bands.device)
        return (torch.maximum(bands, floor) + 4) / 4


class LogMelStream:
    """The same features, piece by piece: ``push`` samples, get the frames that are complete, ``finish`` for the rest.

    Equal to :class:`LogMel` of the whole (with "fixed" scaling). Holds at most a window of samples.
    """

    def __init__(self, mel: LogMel) -> None:
        if mel.scaling != "fixed":
            raise ValueError(
                "features scaled by the loudest value of the recording cannot be streamed; use scaling='fixed'"
            )
        self.mel = mel
        self.kept = torch.zeros(1, 0, device=mel.window.device)  #: samples that later windows still need
        self.started = False
        self.samples = self.made = 0  #: samples read, frames made

    def push(self, samples: Tensor) -> Tensor:
        """(n,) samples to (1, frames, n_mels), perhaps of no frames."""
        self.samples += samples.shape[-1]
        self.kept = torch.cat([self.kept, samples.reshape(1, -1).to(self.kept)], dim=1)
        half = self.mel.n_fft // 2
        if not self.started:
            if self.kept.shape[1] <= half:
                return self.kept.new_zeros(1, 0, self.mel.n_mels)
            self.kept = F.pad(self.kept[:, None], (half, 0), mode="reflect")[:, 0]
            self.started = True
        return self._frames()

    def _frames(self) -> Tensor:
        count = max(0, (self.kept.shape[1] - self.mel.n_fft) // self.mel.hop + 1)
        if count == 0:
            return self.kept.new_zeros(1, 0, self.mel.n_mels)
        used = self.mel.n_fft + (count - 1) * self.mel.hop
        made = self.mel.scale(self.mel.bands(self.kept[:, :used]))
        self.kept = self.kept[:, count * self.mel.hop :]
        self.made += count
        return made

    def finish(self) -> Tensor:
        """The frames whose windows reach beyond the end; the stream is over."""
        if not self.started:  # shorter than half a window
            return self.mel(self.kept)
        half, due = self.mel.n_fft // 2, self.mel.frames(self.samples) - self.made
        mirror = self.kept[:, -(half + 1) : -1].flip(1)
        self.kept = torch.cat([self.kept, mirror], dim=1)
        return self._frames()[:, :due]
