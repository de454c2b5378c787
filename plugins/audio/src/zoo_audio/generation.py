"""Sound from SaShiMi, sample by sample, in constant memory."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.pipelines import Pipeline, Result
from zoo_registry import errors

from .files import EXTENSIONS, Audio, open_audio
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


def pick(
    logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """A token of each row of ``logits`` (batch, V), and its log-probability under the untempered model.

    ``temperature`` 0: the most likely. ``top_p``: only the likeliest tokens that reach this probability together.
    ``generators``: one that all rows are drawn from, or one for each row.
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
        parts = [probs] if len(generators) == 1 else probs.split(1)
        token = torch.cat(
            [torch.multinomial(part, 1, generator=own) for part, own in zip(parts, generators, strict=True)]
        )[:, 0]
    return token, log_probs.gather(1, token[:, None])[:, 0]


def stream(
    model: SashimiLM, batch: int = 1, *, temperature: float = 1.0, top_p: float = 1.0, seed: int | Sequence[int] = 0,
    prompt: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Tokens and log-probabilities (batch,) each, without end. ``prompt`` (batch, n) ids that the sound begins with
    (they are not yielded). ``seed``: one for all recordings, or one for each, which then do not depend on the others.
    The state has a fixed size, so this can run as long as wanted.

    Raises BadArgument, which is a ValueError, for a temperature below 0, top_p outside (0, 1], and a prompt of another
    shape or with other tokens than the model's.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise errors.BadArgument(
            f"temperature is {temperature} and top_p {top_p}; expected temperature of at least 0 and top_p in (0, 1]",
            argument="temperature", accepted=[],
        )  # fmt: skip
    given: Any = seed  # numpy's integers and arrays too
    seeds = [int(given)] if isinstance(given, numbers.Integral) else [int(one) for one in given]
    if len(seeds) not in (1, batch):
        raise errors.BadArgument(
            f"{len(seeds)} seeds for {batch} recordings; expected one, or one for each", argument="seed", accepted=[]
        )
    if prompt is not None:
        _check_prompt(prompt, batch, model.vocab_size)
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(one) for one in seeds]
    step = stepping(model, batch)
    token = torch.full((batch,), model.vocab_size // 2, device=device)
    if prompt is not None:
        for column in prompt.to(device).unbind(1):
            step(token)
            token = column
    while True:
        token, value = pick(step(token), temperature, top_p, generators)
        yield token, value


def _check_prompt(prompt: Tensor, batch: int, vocabulary: int) -> None:
    if prompt.ndim != 2 or prompt.shape[0] != batch or prompt.is_floating_point():
        raise errors.BadArgument(
            f"the prompt is {tuple(prompt.shape)} of {prompt.dtype}; expected token ids ({batch}, samples)",
            argument="prompt", accepted=[],
        )  # fmt: skip
    if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
        raise errors.BadArgument(
            f"the prompt holds tokens {int(prompt.min())} to {int(prompt.max())}; expected 0 to {vocabulary - 1}",
            argument="prompt", accepted=[],
        )  # fmt: skip


def stepping(model: SashimiLM, batch: int) -> Callable[[Tensor], Tensor]:
    """A function of the next tokens (batch,), with the state inside: unrolled on a CPU, layer by layer elsewhere."""
    if next(model.parameters()).device.type == "cpu":
        return Stepper(model, batch).step
    state = model.init_state(batch)
    return lambda tokens: model.step(tokens, state)


@torch.inference_mode()
def generate(model: SashimiLM, samples: int, batch: int = 1, *, ranked: bool = True, **sampling: Any) -> Sound:
    """``samples`` samples of ``batch`` recordings; ``sampling``: see :func:`stream`. ``ranked``: the likeliest
    recording comes first, as the authors rank theirs; False keeps the order, that of the prompts. Raises BadArgument
    for samples below 1."""
    if samples < 1 or batch < 1:
        raise errors.BadArgument(
            f"samples is {samples} and batch {batch}; expected at least 1 of each", argument="samples", accepted=[]
        )
    model.eval()
    began = time.perf_counter()
    tokens = torch.empty(batch, samples, dtype=torch.uint8)
    total = torch.zeros(batch)
    source = stream(model, batch, **sampling)
    for t in range(samples):
        token, value = next(source)
        tokens[:, t] = token
        total += value.cpu()
    order = total.argsort(descending=True) if ranked else torch.arange(batch)
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
    extensions = EXTENSIONS

    def __init__(
        self, model: Any, seconds: float = 0.25, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
        longest_prompt: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__(model)
        if not isinstance(model, SashimiLM):
            raise errors.BadArgument(
                f"{self.name} is a {type(model).__name__}; audio generation needs a SashimiLM",
                argument="model", accepted=["SashimiLM"],
            )  # fmt: skip
        if model.vocab_size != 256:
            raise errors.BadArgument(
                f"{self.name} has {model.vocab_size} tokens; recordings are read as 256, 8-bit mu-law samples",
                argument="model", accepted=[],
            )  # fmt: skip
        for name, value in (("seconds", seconds), ("longest_prompt", longest_prompt)):
            if not 0 < value < math.inf:
                raise errors.BadArgument(f"{name} is {value}; expected more than 0", argument=name, accepted=[])
        self.lm: SashimiLM = model
        self.seconds, self.longest_prompt = seconds, longest_prompt
        self.sampling, self.seed = {"temperature": temperature, "top_p": top_p}, seed

    def read(self, source: Any) -> Audio:
        return open_audio(source)

    def prepare(self, sample: Audio) -> dict[str, Tensor]:
        longest = max(1, int(self.longest_prompt * self.lm.sample_rate))
        samples = np.zeros(0, np.float32)
        for piece, _ in sample.pieces(self.lm.sample_rate):  # hours may lie before the end that is read
            samples = np.concatenate([samples, piece])[-longest:]
        return {"prompt": mu_law_encode(torch.from_numpy(samples)[None, :, None], scale=False)[0, :, 0]}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every recording with a generator of its own, so that its answer is the same alone and in a batch."""
        prompt = batch["prompt"]
        count, seeds = prompt.shape[0], [self.seed] * prompt.shape[0]
        samples = max(1, round(self.seconds * self.lm.sample_rate))
        made = generate(self.lm, samples, count, ranked=False, prompt=prompt, seed=seeds, **self.sampling)
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
