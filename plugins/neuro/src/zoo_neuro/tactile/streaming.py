"""One frame after the other, as it comes from a sensor: the same numbers as the whole recording at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .model import TactileNetwork
from .recordings import VALUES, Layout


class TouchStream:
    """A network's state between frames, of ``batch`` recordings that go on together.

    A model that decodes its last time step (``steps = [-1]``) answers after every frame, as if the recording ended
    there; one that decodes several steps answers when all ``n_times`` frames were given. A GPT has positions for a
    limited number of frames and says so beyond it.
    """

    def __init__(self, model: TactileNetwork, batch: int = 1) -> None:
        self.model, self.batch = model.eval(), batch
        self.layout = Layout.of(model)
        self.reset()

    def reset(self) -> None:
        """Begin a new recording."""
        self.frames = 0
        self._encoder: Any = self.model.encoder.init_state(self.batch)  # type: ignore[operator]
        self._attender: Any = self.model.attender.init_state(self.batch) if self.model.attends else None  # type: ignore[operator]
        self._features: list[Tensor] = []
        self._samples = torch.zeros(self.batch, 0, self.layout.input_shape[1] * self.layout.input_shape[2], VALUES)

    @torch.inference_mode()
    def features(self, frame: Tensor) -> Tensor | None:
        """A frame (batch, channels, rows, columns) to what the attender (or encoder) gives, (batch, width); None while
        a GPT gathers frames before its next answer."""
        if frame.dim() != 4 or tuple(frame.shape) != (self.batch, *self.model.input_shape):
            raise ValueError(
                f"a frame has shape {tuple(frame.shape)}; expected {(self.batch, *self.model.input_shape)}"
            )
        x: Tensor = self.model.encoder.step(self.model.scaled(frame), self._encoder)  # type: ignore[operator]
        self.frames += 1
        return self.model.attender.step(x, self._attender) if self.model.attends else x  # type: ignore[operator, no-any-return]

    @torch.inference_mode()
    def step(self, frame: Tensor) -> Tensor | None:
        """A frame (batch, channels, rows, columns) to logits (batch, categories), or None where none are due yet."""
        model = self.model
        y = self.features(frame)
        if y is None:
            return None
        if model.decoder.steps == [-1]:
            return model.head(model.decoder(y[:, None]))  # type: ignore[no-any-return]
        self._features.append(y)
        if self.frames != model.n_times:
            return None
        steps = model.decoder.wanted(len(self._features)) or range(len(self._features))
        return model.head(model.decoder(torch.stack([self._features[t] for t in steps], 1)))  # type: ignore[no-any-return]

    def push(self, samples: Tensor | np.ndarray) -> list[Tensor]:
        """Samples as they come, (batch, count, whiskers, 6) or (count, whiskers, 6) for one recording: the logits after
        every frame that they complete. Samples of an unfinished frame wait."""
        x = torch.as_tensor(samples).float()
        x = x[None] if x.dim() == 3 else x
        if x.dim() != 4 or x.shape[0] != self.batch or x.shape[2:] != self._samples.shape[2:]:
            whiskers = self._samples.shape[2]
            raise ValueError(
                f"samples have shape {tuple(x.shape)}; expected ({self.batch}, count, {whiskers}, {VALUES})"
            )
        self._samples = torch.cat([self._samples, x], 1)
        step, found = self.layout.step, []
        like = next(self.model.parameters())
        while self._samples.shape[1] >= step:
            now, self._samples = self._samples[:, :step], self._samples[:, step:]
            logits = self.step(self.layout.frames(now)[:, 0].to(like.device, like.dtype))
            if logits is not None:
                found.append(logits)
        return found
