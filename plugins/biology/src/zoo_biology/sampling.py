"""Drawing tokens: temperature, the likeliest k, the likeliest that reach a probability together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo_registry import errors


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_k 0 and top_p 1 keep all. Raises BadArgument for others."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0) or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise errors.BadArgument(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}; expected temperature and "
                "top_k of 0 or more and top_p in (0, 1]",
                argument="temperature",
                accepted=[],
            )

    def generator(self) -> torch.Generator:
        """On the CPU, so that a seed means the same everywhere."""
        return torch.Generator().manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A token of each row of (batch, vocabulary), and its -ln p under the model as it is."""
        cost = -logits.float().cpu().log_softmax(-1)
        if self.temperature == 0:
            token = cost.argmin(-1)
        else:
            scores = -cost / self.temperature
            if 0 < self.top_k < scores.shape[-1]:
                scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -torch.inf)
            chances = scores.softmax(-1)
            if self.top_p < 1:
                ranked, order = chances.sort(-1, descending=True)
                ranked = ranked * (ranked.cumsum(-1) - ranked < self.top_p)
                chances = torch.zeros_like(chances).scatter_(-1, order, ranked)
            token = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return token.to(logits.device), cost.gather(1, token[:, None])[:, 0]
