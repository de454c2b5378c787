"""Text and continuous image patches in one sequence of Mixture-of-Mamba blocks: the paper's Transfusion setting.

Text is predicted token by token, images are denoised: every patch of a picture carries the picture's noise level, and
the model predicts the noise in it. Papers: arXiv 2501.16295 (section on Transfusion); Zhou et al., "Transfusion", arXiv
2408.11039 (losses, weight 5 of the diffusion loss); Ho et al., arXiv 2006.11239 (DDPM); Nichol and Dhariwal, arXiv
2102.09672 (cosine schedule). Our reading where the block's repository is silent: linear maps of patches, a sinusoidal
embedding of the noise level through an MLP, patches read in raster order like every other token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo import placement
from zoo.layers import GradCheckpointing, Linear

from .mixture_lm import Stack, State, choose, fork
from .mixture_of_mamba import PROJECTIONS

TEXT, IMAGE = 0, 1


class NoiseLevel(nn.Module):
    """Timesteps (...) to vectors (..., D): 256 sines and cosines, then an MLP."""

    def __init__(self, d_model: int, width: int = 256) -> None:
        super().__init__()
        self.width = width
        self.fc1, self.fc2 = Linear(width, d_model), Linear(d_model, d_model)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.width // 2
        exponents = torch.arange(half, device=timesteps.device) / half
        angles = timesteps[..., None].float() * torch.exp(-math.log(10_000) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(nn.functional.silu(self.fc1(waves)))


class TransfusionMamba(GradCheckpointing, nn.Module):
    """Embedded tokens and projected patches through one :class:`~zoo_multimodal.mixture_lm.Stack`, and two heads.

    Arguments: ``d_model``, ``n_layer``, ``vocab_size`` V of the text, ``latent_dim`` of a patch, ``timesteps`` of the
    diffusion, ``ssm``, ``split``, ``dense``, ``norm_eps`` as Stack's, ``tie_embeddings``. The id V stands for a patch.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        latent_dim: int,
        timesteps: int = 1000,
        ssm: Mapping[str, Any] | None = None,
        split: Sequence[str] = PROJECTIONS,
        dense: bool = False,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("latent_dim", latent_dim), ("timesteps", timesteps)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        self.vocab_size, self.latent_dim, self.timesteps = vocab_size, latent_dim, timesteps
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.latent_in, self.level = Linear(latent_dim, d_model), NoiseLevel(d_model)
        self.stack = Stack(d_model, n_layer, 2, ssm, split, dense, norm_eps)
        self.latent_out = Linear(d_model, latent_dim)
        self.lm_head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)

    @property
    def patch_id(self) -> int:
        """The id that stands where a patch is."""
        return self.vocab_size

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        return tuple(f"stack.{name}" for name in self.stack.unused_parameters)

    def start_state(self, batch: int = 1) -> State:
        """The state of ``batch`` empty documents."""
        return self.stack.init_state(batch)

    def text_head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding if self.lm_head is None else self.lm_head)

    def forward(
        self, input_ids: Tensor, latents: Tensor, timesteps: Tensor, *,
        lengths: Tensor | None = None, state: State | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Predictions for every position.

        input_ids: (batch, length), V where there is a patch; latents: (batch, length, latent_dim), read at patches,
        noisy as ``timesteps`` (batch, length) say there (0: clean). lengths, state: as in MixtureLM.
        Returns "logits" (batch, length, V) of the next token, and "noise" (batch, length, latent_dim), that in the
        position's own patch.
        """
        hidden = self.hidden(input_ids, latents, timesteps, lengths=lengths, state=state)
        return {"logits": self.text_head(hidden), "noise": self.latent_out(hidden)}

    def hidden(
        self, input_ids: Tensor, latents: Tensor, timesteps: Tensor, *,
        lengths: Tensor | None = None, state: State | None = None,
    ) -> Tensor:  # fmt: skip
        if latents.shape != (*input_ids.shape, self.latent_dim) or timesteps.shape != input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, latents {tuple(latents.shape)}, timesteps "
                f"{tuple(timesteps.shape)}; expected (batch, length), (batch, length, {self.latent_dim}), (batch, "
                "length)"
            )
        patch = input_ids == self.patch_id
        text = self.embedding(input_ids.clamp(max=self.vocab_size - 1))
        image = self.latent_in(latents) + self.level(timesteps)
        x = torch.where(patch[..., None], image, text)
        return self.stack(x, patch.long(), state=state, lengths=lengths)

    # -- diffusion

    def signal(self, timesteps: Tensor) -> Tensor:
        """Share of a patch's variance that is picture at a noise level: the cosine schedule, 1 at 0, 0 at the end."""
        t = timesteps.float() / self.timesteps
        share = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        return share.clamp(0.0, 1.0)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(s) latents + sqrt(1 - s) noise`` with the share s of each position's noise level."""
        share = self.signal(timesteps)[..., None].to(latents.dtype)
        return share.sqrt() * latents + (1 - share).sqrt() * noise

    def pictures(self, input_ids: Tensor) -> Tensor:
        """The number of the picture at each position, from 1 (text: the last before it); patches in a row are one."""
        patch = (input_ids == self.patch_id).long()
        begins = patch - nn.functional.pad(patch, (1, 0))[:, :-1]
        return begins.clamp(min=0).cumsum(1)

    def losses(
        self, input_ids: Tensor, latents: Tensor, lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Mean cross entropy of the "text" tokens 1 .., and mean squared error of the noise predicted in the "image"
        patches, a noise level drawn for every picture. latents are clean. One trains on text + 5 * image."""
        count = torch.full(input_ids.shape[:1], input_ids.shape[1], device=input_ids.device)
        count = count if lengths is None else lengths
        real = torch.arange(input_ids.shape[1], device=input_ids.device) < count[:, None]
        patch = input_ids == self.patch_id
        where = input_ids.device
        # drawn on the CPU, so that a seed means the same everywhere
        levels = torch.randint(1, self.timesteps + 1, (len(input_ids), input_ids.shape[1] + 1), generator=generator)
        steps = levels.to(where).gather(1, self.pictures(input_ids)) * patch
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = torch.where(patch[..., None], self.add_noise(latents, noise, steps), 0)
        found = self(input_ids, noisy, steps, lengths=lengths)
        target = input_ids[:, 1:]
        wanted = (real & ~patch)[:, 1:]
        each = nn.functional.cross_entropy(
            found["logits"][:, :-1].flatten(0, 1).float(),
            target.clamp(max=self.vocab_size - 1).flatten(),
            reduction="none",
        )
        text = (each.view_as(target) * wanted).sum() / wanted.sum().clamp(min=1)
        own = (real & patch)[..., None]
        image = ((found["noise"].float() - noise) ** 2 * own).sum() / (own.sum() * self.latent_dim).clamp(min=1)
        return {"text": text, "image": image}

    # -- generation by the state

    @torch.no_grad()
    def read(self, input_ids: Tensor, latents: Tensor | None, state: State) -> Tensor:
        """Read some text or clean patches, (batch, length); ``state`` moves on. Returns the next token's logits."""
        if latents is None:
            latents = self.latent_in.weight.new_zeros(*input_ids.shape, self.latent_dim)
        hidden = self.hidden(input_ids, latents, torch.zeros_like(input_ids), state=state)
        return self.text_head(hidden[:, -1])

    @torch.no_grad()
    def draw(
        self, patches: int, state: State, *, steps: int = 250, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """A picture behind what ``state`` has read: its clean patches (batch, patches, latent_dim), and the logits of
        the token after it. ``state`` then has read the picture.

        Every denoising step reads the patches from a copy of the state, so what stands before is never read again.
        DDPM's ancestral sampling on ``steps`` of the levels.
        """
        batch = len(state[0]["ssm"])
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps is {steps}; expected 1 to {self.timesteps}, the model's noise levels")
        where = self.latent_in.weight
        ids = torch.full((batch, patches), self.patch_id, device=where.device)

        def gaussian() -> Tensor:
            return torch.randn(batch, patches, self.latent_dim, generator=generator).to(where)

        levels = torch.linspace(self.timesteps, 0, steps + 1).round().long().tolist()
        x = gaussian()
        for level, after in itertools.pairwise(levels):
            now = torch.full_like(ids, level)
            noise = self.latent_out(self.hidden(ids, x, now, state=fork(state)))
            x = self.denoise(x, noise, level, after, gaussian() if after else None)
        return x, self.read(ids, x, state)

    def denoise(self, x: Tensor, noise: Tensor, level: int, after: int, fresh: Tensor | None) -> Tensor:
        """From noise ``level`` to the lower ``after``, given the predicted noise; ``fresh`` noise where any is left.

        The picture that the prediction implies, weighed against x by the posterior of the forward process (arXiv
        2006.11239, equation 7).
        """
        share, then = (float(self.signal(torch.tensor(t))) for t in (level, after))
        share = max(share, 1e-5)  # at the last level nothing of the picture is left to divide by
        clean = (x - (1 - share) ** 0.5 * noise) / share**0.5
        if fresh is None:
            return clean
        step = share / then
        mean = (then**0.5 * (1 - step) * clean + step**0.5 * (1 - then) * x) / (1 - share)
        return mean + ((1 - then) / (1 - share) * (1 - step)) ** 0.5 * fresh

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, *, begin_image: int, patches: int, max_new_tokens: int, stop: Sequence[int] = (),
        latents: Tensor | None = None, steps: int = 250, temperature: float = 0.0, top_k: int = 0, seed: int = 0,
    ) -> tuple[list[int], list[Tensor]]:  # fmt: skip
        """Continue one document, (1, length) ids with clean ``latents`` (1, length, latent_dim) where it has patches.

        After the id ``begin_image`` a picture of ``patches`` patches is drawn. Returns the new ids, with patch ids
        where pictures are, and the pictures' patches (patches, latent_dim) in order.
        """
        generator = torch.Generator().manual_seed(seed)
        state = self.start_state(1)
        logits = self.read(input_ids, latents, state)[0]
        found: list[int] = []
        pictures: list[Tensor] = []
        for _ in range(max_new_tokens):
            token = choose(logits, slice(0, self.vocab_size), temperature, top_k, generator)
            found.append(token)
            logits = self.read(torch.tensor([[token]], device=input_ids.device), None, state)[0]
            if token in stop:
                break
            if token == begin_image:
                picture, after = self.draw(patches, state, steps=steps, generator=generator)
                found += [self.patch_id] * patches
                pictures.append(picture[0])
                logits = after[0]
        return found, pictures
