"""Sound from SaShiMi, sample by sample, in constant memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.pipelines import Pipeline, Result

from .files import Audio, open_audio
from .mulaw import mu_law_decode, mu_law_encode
from .pictures import waveform
from .sashimi import SashimiLM
from .sashimi_step import Stepper


@dataclass
class Sound:
    """Generated recordings: ``tokens`` (batch, samples), and the log-likelihood of each in nats, prompt not counted."""

    tokens: Tensor
    log_likelihood: Tensor
    rate: int
    seconds: float  #: what generating took

    @property
    def samples(self) -> np.ndarray:
        """(batch, samples) in [-1, 1)."""
        return mu_law_decode(self.tokens).numpy()

    @property
    def per_second(self) -> float:
        """Samples generated a second, of all recordings together."""
        return self.tokens.numel() / self.seconds if self.seconds else math.nan


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token of each row of ``logits`` (batch, V), and its log-probability under the untempered model.

    ``temperature`` 0: the most likely. ``top_p``: only the likeliest tokens that reach this probability together.
    """
    log_probs = logits.float().log_softmax(-1)
    if temperature == 0:
        token = log_probs.argmax(-1)
    else:
        probs = (log_probs / temperature).softmax(-1)
        if top_p < 1:
            ranked, order = probs.sort(-1, descending=True)
            ranked = ranked * (ranked.cumsum(-1) - ranked < top_p)
            probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        token = torch.multinomial(probs, 1, generator=generator)[:, 0]
    return token, log_probs.gather(1, token[:, None])[:, 0]


def stream(
    model: SashimiLM, batch: int = 1, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
    prompt: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Tokens and log-probabilities (batch,) each, without end. ``prompt`` (batch, n) ids that the sound begins with
    (they are not yielded). The state has a fixed size, so this can run as long as wanted.

    Raises ValueError for a temperature below 0 or top_p outside (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature is {temperature} and top_p {top_p}; expected temperature of at least 0 and top_p in (0, 1]"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    step = stepping(model, batch)
    token = torch.full((batch,), model.vocab_size // 2, device=device)
    if prompt is not None:
        for column in prompt.to(device).unbind(1):
            step(token)
            token = column
    while True:
        token, value = pick(step(token), temperature, top_p, generator)
        yield token, value


def stepping(model: SashimiLM, batch: int) -> Callable[[Tensor], Tensor]:
    """A function of the next tokens (batch,), with the state inside: unrolled on a CPU, layer by layer elsewhere."""
    if next(model.parameters()).device.type == "cpu":
        return Stepper(model, batch).step
    state = model.init_state(batch)
    return lambda tokens: model.step(tokens, state)


@torch.inference_mode()
def generate(model: SashimiLM, samples: int, batch: int = 1, **sampling: Any) -> Sound:
    """``samples`` samples of ``batch`` recordings; ``sampling``: see :func:`stream`. The likeliest recording comes
    first, as the authors rank theirs. Raises ValueError for samples below 1."""
    if samples < 1 or batch < 1:
        raise ValueError(f"samples is {samples} and batch {batch}; expected at least 1 of each")
    model.eval()
    began = time.perf_counter()
    tokens = torch.empty(batch, samples, dtype=torch.uint8)
    total = torch.zeros(batch)
    source = stream(model, batch, **sampling)
    for t in range(samples):
        token, value = next(source)
        tokens[:, t] = token
        total += value.cpu()
    order = total.argsort(descending=True)
    return Sound(tokens[order].long(), total[order], model.sample_rate, time.perf_counter() - began)


@torch.inference_mode()
def bits_per_sample(model: SashimiLM, tokens: Tensor) -> float:
    """Mean -log2 p(sample | all before it) of recordings (batch, length), the start token before the first."""
    start = torch.full_like(tokens[:, :1], model.vocab_size // 2)
    logits = model(torch.cat([start, tokens[:, :-1]], dim=1))
    return float(F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())) / math.log(2)


# -- a pipeline --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class GeneratedAudio(Result):
    """How a recording goes on. ``samples`` holds the beginning that was given and what the model added."""

    seconds: float = 0.0  #: of what was generated
    prompt_seconds: float = 0.0
    bits: float = 0.0  #: mean -log2 p of the generated samples under the model
    per_second: float = 0.0  #: samples generated a second
    rate: int = 16000
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)

    def summary(self) -> str:
        return (
            f"{self.seconds:.2f} s after {self.prompt_seconds:.2f} s, {self.bits:.2f} bits a sample, "
            f"{self.per_second:.0f} samples a second"
        )

    def picture(self) -> Image.Image:
        return waveform(self.samples, self.rate)


class AudioGeneration(Pipeline):
    """Continue recordings with SaShiMi: the beginning is read as tokens, then samples are drawn one by one.

    Inputs: audio files or (samples, rate). Options: ``seconds`` to add, ``temperature``, ``top_p``, ``seed``;
    ``longest_prompt``: the last so many seconds of the recording are read.
    """

    task = "audio-generation"
    extensions = (".wav", ".flac", ".ogg", ".mp3")

    def __init__(
        self, model: Any, seconds: float = 0.25, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
        longest_prompt: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__(model)
        if not isinstance(model, SashimiLM):
            raise ValueError(f"{self.name} is a {type(model).__name__}; audio generation needs a SashimiLM")
        if model.vocab_size != 256:
            raise ValueError(
                f"{self.name} has {model.vocab_size} tokens; recordings are read as 256, 8-bit mu-law samples"
            )
        self.lm: SashimiLM = model
        self.seconds, self.longest_prompt = seconds, longest_prompt
        self.sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}

    def read(self, source: Any) -> Audio:
        return open_audio(source)

    def prepare(self, sample: Audio) -> dict[str, Tensor]:
        samples, _ = sample.whole(self.lm.sample_rate)
        samples = samples[-max(1, int(self.longest_prompt * self.lm.sample_rate)) :]
        return {"prompt": mu_law_encode(torch.from_numpy(samples)[None, :, None], scale=False)[0, :, 0]}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        prompt = batch["prompt"]
        made = generate(
            self.lm, max(1, round(self.seconds * self.lm.sample_rate)), prompt.shape[0], prompt=prompt, **self.sampling
        )
        speed = torch.full((prompt.shape[0],), made.per_second)
        return {"prompt": prompt, "tokens": made.tokens, "nats": -made.log_likelihood, "speed": speed}

    def finish(self, output: dict[str, Tensor], sample: Audio) -> GeneratedAudio:
        count, rate = output["tokens"].numel(), self.lm.sample_rate
        whole = torch.cat([output["prompt"], output["tokens"]])
        return GeneratedAudio(
            seconds=count / rate, prompt_seconds=output["prompt"].numel() / rate, rate=rate,
            bits=float(output["nats"]) / count / math.log(2), per_second=float(output["speed"]),
            samples=mu_law_decode(whole).numpy(),
        )  # fmt: skip
