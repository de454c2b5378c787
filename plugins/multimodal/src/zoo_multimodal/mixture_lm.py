"""A language model over discrete tokens of several modalities, of Mixture-of-Mamba blocks.

The settings of the paper (arXiv 2501.16295) with discrete tokens: text and VQ-coded images (Chameleon), and speech
tokens as a third modality. All tokens are one sequence and predicted alike. The original publishes the block alone: the
stack ``x + mixer(norm(x))`` without an MLP follows its example and the paper, sizes and the layout of ids are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo import placement
from zoo.layers import GradCheckpointing, Mamba, Recomputed, RMSNorm

from .mixture_of_mamba import PROJECTIONS, MixtureOfMamba
from .routing import Routing, route

#: What a model has read, one dictionary of tensors a block; it has the same size after any number of tokens.
State = list[dict[str, Tensor]]


def fork(state: State, copies: int = 1) -> State:
    """An independent copy, each text ``copies`` times in a row."""
    return [{k: v.repeat_interleave(copies, 0) if copies > 1 else v.clone() for k, v in own.items()} for own in state]


class Block(Recomputed):
    """``x + mixer(norm(x))``."""

    def __init__(self, d_model: int, mixer: Mamba, norm_eps: float) -> None:
        super().__init__()
        self.norm, self.mixer = RMSNorm(d_model, norm_eps), mixer

    def forward(
        self,
        x: Tensor,
        routing: Routing | None,
        *,
        state: dict[str, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        how: dict[str, Any] = {"state": state, "lengths": lengths}
        if isinstance(self.mixer, MixtureOfMamba):
            return x + self.mixer(self.norm(x), routing, **how)
        return x + self.mixer(self.norm(x), **how)

    def step(self, x: Tensor, state: dict[str, Tensor], routing: Routing | None) -> Tensor:
        n = self.norm(x)
        return x + (
            self.mixer.step(n, state, routing) if isinstance(self.mixer, MixtureOfMamba) else self.mixer.step(n, state)
        )


class Stack(nn.Module):
    """``n_layer`` blocks and a last norm, vectors in and out; tokens are told apart once, for all blocks.

    ``ssm``: the mixers' own arguments; ``split``: the projections of each modality's own; ``dense``: plain Mamba
    blocks, the paper's baseline of equal active size.
    """

    def __init__(
        self, d_model: int, n_layer: int, n_modalities: int, ssm: Mapping[str, Any] | None = None,
        split: Sequence[str] = PROJECTIONS, dense: bool = False, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_modalities, self.routed = n_modalities, bool(split) and not dense
        own = dict(ssm or {})
        self.blocks = nn.ModuleList(
            Block(
                d_model, Mamba(d_model, **own) if dense else MixtureOfMamba(d_model, n_modalities, split=split, **own),
                norm_eps,
            )
            for _ in range(n_layer)
        )  # fmt: skip
        self.norm_f = RMSNorm(d_model, norm_eps)

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Biases of time steps that a dt_proj which is not split does not add (see :class:`MixtureOfMamba`)."""
        every = enumerate(self.blocks)
        return tuple(f"blocks.{i}.mixer.{n}" for i, b in every for n in getattr(b.mixer, "unused_parameters", ()))

    def init_state(self, batch: int) -> State:
        return [block.mixer.init_state(batch) for block in self.blocks]  # type: ignore[operator, union-attr]

    def _routing(self, modality: Tensor) -> Routing | None:
        return route(modality, self.n_modalities, modality.numel()) if self.routed else None

    def forward(
        self, x: Tensor, modality: Tensor, *, state: State | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """x (batch, length, D) and each token's modality (batch, length) to (batch, length, D); ``state`` moves on."""
        routing = self._routing(modality)
        for i, block in enumerate(self.blocks):
            x = block(x, routing, state=None if state is None else state[i], lengths=lengths)
        return self.norm_f(x)

    def step(self, x: Tensor, modality: Tensor, state: State) -> Tensor:
        """One token of each text, (batch, D) and (batch,), to (batch, D)."""
        routing = self._routing(modality)
        for block, own in zip(self.blocks, state, strict=True):
            x = block.step(x, own, routing)  # type: ignore[operator]
        return self.norm_f(x)


class MixtureLM(GradCheckpointing, nn.Module):
    """Embedding, Mixture-of-Mamba blocks, norm, head; every token's modality follows from its id.

    Arguments: ``d_model``; ``n_layer`` (Mamba blocks; two stand for one layer of a transformer); ``vocab_sizes``, of
    each modality: ids count on from one to the next, so that of (100, 64) text has 0 .. 99 and images 100 .. 163;
    ``ssm``, ``split``, ``dense``, ``norm_eps`` as :class:`Stack`; ``tie_embeddings``: the head is the embedding.

    For models that read characters and pictures themselves: ``alphabet``, the characters that follow the three special
    ids of :mod:`zoo_multimodal.documents`; ``patch``, the side in pixels of the squares that modality 1 codes, whose
    colours are the buffer ``codebook`` (codes, 3, patch, patch), 0 to 1; ``grid``, squares a side of a picture.
    """

    codebook: Tensor

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_sizes: Sequence[int],
        ssm: Mapping[str, Any] | None = None,
        split: Sequence[str] = PROJECTIONS,
        dense: bool = False,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = True,
        alphabet: str = "",
        patch: int = 0,
        grid: int = 0,
    ) -> None:
        super().__init__()
        if not vocab_sizes or min(vocab_sizes) < 1:
            raise ValueError(f"vocab_sizes is {list(vocab_sizes)}; expected one positive size for each modality")
        if alphabet and vocab_sizes[0] != 3 + len(alphabet):
            raise ValueError(
                f"vocab_sizes[0] is {vocab_sizes[0]}, and the alphabet has {len(alphabet)} characters; expected "
                f"{3 + len(alphabet)}: three special ids come first"
            )
        if (patch or grid) and (patch < 1 or grid < 1 or len(vocab_sizes) < 2):
            raise ValueError(f"patch is {patch}, grid {grid}; expected both positive, and vocab_sizes of two or more")
        self.vocab_sizes, self.vocab_size = tuple(vocab_sizes), sum(vocab_sizes)
        self.alphabet, self.patch, self.grid = alphabet, patch, grid
        self.embedding = nn.Embedding(self.vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.stack = Stack(d_model, n_layer, len(vocab_sizes), ssm, split, dense, norm_eps)
        self.lm_head = None if tie_embeddings else nn.Linear(d_model, self.vocab_size, bias=False)
        if patch:
            self.register_buffer("codebook", torch.zeros(vocab_sizes[1], 3, patch, patch))

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        return tuple(f"stack.{name}" for name in self.stack.unused_parameters)

    @property
    def starts(self) -> list[int]:
        """The first id of each modality."""
        return [sum(self.vocab_sizes[:m]) for m in range(len(self.vocab_sizes))]

    def modality(self, input_ids: Tensor) -> Tensor:
        """The modality of each id."""
        kinds = torch.zeros_like(input_ids)
        for start in self.starts[1:]:
            kinds = kinds + (input_ids >= start)
        return kinds

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding if self.lm_head is None else self.lm_head)

    def init_state(self, batch: int = 1) -> State:
        """The state of ``batch`` empty texts."""
        return self.stack.init_state(batch)

    def forward(self, input_ids: Tensor, *, lengths: Tensor | None = None, state: State | None = None) -> Tensor:
        """Logits of every position, (batch, length, vocabulary), from (batch, length) ids.

        lengths: (batch,) tokens of each text, right-padded with any ids. state: go on from it; it moves on in place.
        """
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; expected integers (batch, length)"
            )
        hidden = self.stack(self.embedding(input_ids), self.modality(input_ids), state=state, lengths=lengths)
        return self.head(hidden)

    def step(self, token: Tensor, state: State) -> Tensor:
        """One token of each text, (batch,) ids, to the next one's logits (batch, vocabulary); equal to the whole."""
        return self.head(self.stack.step(self.embedding(token), self.modality(token), state))


def losses(model: MixtureLM, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the tokens 1 .. of each text, summed by modality, and how many they are: (modalities,) each.

    input_ids: (batch, length), right-padded; lengths: (batch,). In nats.
    """
    logits = model(input_ids[:, :-1], lengths=lengths - 1)
    target = input_ids[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view_as(target)
    real = torch.arange(1, input_ids.shape[1], device=target.device) < lengths[:, None]
    kinds = model.modality(target)
    own = [real & (kinds == m) for m in range(len(model.vocab_sizes))]
    return torch.stack([torch.where(o, loss, 0).sum() for o in own]), torch.stack([o.sum() for o in own])


def choose(logits: Tensor, allowed: slice, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """The next id of one text among ``allowed``: the likeliest at temperature 0, else drawn."""
    own = logits[allowed].float().cpu()
    if temperature == 0:
        return allowed.start + int(own.argmax())
    own = own / temperature
    if 0 < top_k < own.numel():
        own = own.masked_fill(own < own.topk(top_k).values[-1], -torch.inf)
    return allowed.start + int(torch.multinomial(own.softmax(0), 1, generator=generator))


@torch.no_grad()
def generate(
    model: MixtureLM,
    logits: Tensor,
    state: State,
    modality: int | None = None,
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[list[int], Tensor]:
    """Go on from ``state`` (one text) whose next token has ``logits`` (vocabulary,), in memory of constant size.

    modality: only its tokens are chosen (None: any). stop: ids that end the text; such a token is read and returned
    too. Returns the new tokens and the logits behind the last one; ``state`` has read them all.
    """
    start = 0 if modality is None else model.starts[modality]
    size = model.vocab_size if modality is None else model.vocab_sizes[modality]
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    found: list[int] = []
    for _ in range(max_new_tokens):
        token = choose(logits, slice(start, start + size), temperature, top_k, generator)
        found.append(token)
        logits = model.step(torch.tensor([token], device=logits.device), state)[0]
        if token in stop:
            break
    return found, logits
