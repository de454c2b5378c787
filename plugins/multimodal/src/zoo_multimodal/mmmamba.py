"""mmMamba: image tiles and text through two stacks of decoder layers, Mamba-2 or softmax attention in each layer.

Paper: Liao, Tao et al., "Multimodal Mamba: Decoder-only Multimodal State Space Model via Quadratic to Linear
Distillation", arXiv 2502.13145. Original: hustvl/mmMamba @ 85143d0, MIT (``hovle/modeling_holistic_embedding.py``,
``hovle/modeling_internlm2.py``, ``hovle/modeling_internvl_chat.py``). With every layer softmax it is HoVLE, the
teacher. Differs: it decodes from a state (the released code of that lies on the Hub alone), and counts image tokens
before it puts them in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Linear, RMSNorm

from .mmmamba_mixers import LayerState
from .mmmamba_parts import Run, Stack, VisionEmbeddings, pixel_shuffle


@dataclass
class State:
    """What a model has read: a dictionary of tensors a layer, batch first, of both stacks.

    ``position`` and ``embedding_position``: tokens read by the language and the embedding stack (they differ in the HD
    form alone); ``logits``: (batch, vocabulary) for the next token. ``step`` and ``prefill`` move it on in place.
    """

    embedding: list[LayerState] = field(repr=False)
    language: list[LayerState] = field(repr=False)
    position: int = 0
    embedding_position: int = 0
    logits: Tensor | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the layers' memories hold."""
        layers = (*self.embedding, *self.language)
        return sum(t.numel() * t.element_size() for layer in layers for t in layer.values())

    def fork(self) -> State:
        """An independent copy, to ask one image several questions."""
        embedding, language = (
            [{name: t.clone() for name, t in layer.items()} for layer in stack]
            for stack in (self.embedding, self.language)
        )
        return State(embedding, language, self.position, self.embedding_position, self.logits)


class MmMamba(GradCheckpointing, nn.Module):
    """Image tiles and text to the next token's logits.

    Arguments: ``vocab_size``; ``d_model`` D; ``embedding`` and ``language``, the arguments of each :class:`Stack`;
    ``image_size`` and ``patch_size`` of a tile; ``image_token``, the id whose places the image tokens take;
    ``shuffle``: where image tokens become fewer by ``downsample_ratio``^2: "pre" (before the embedding stack), "post"
    (after it: the HD form) or None; ``text_vocab_size`` of the embedding stack (default: ``vocab_size``);
    ``special_tokens``: rows of a second table for the ids behind it; ``normalize_embeddings``: the language stack gets
    vectors of length 1.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        embedding: Mapping[str, Any],
        language: Mapping[str, Any],
        image_size: int = 448,
        patch_size: int = 14,
        image_token: int = 92546,
        in_chans: int = 3,
        shuffle: str | None = "pre",
        downsample_ratio: float = 0.5,
        text_vocab_size: int | None = None,
        special_tokens: int = 0,
        normalize_embeddings: bool = False,
    ) -> None:
        super().__init__()
        if shuffle not in ("pre", "post", None):
            raise ValueError(f"shuffle is {shuffle!r}; expected 'pre', 'post' (HD) or None")
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.vocab_size, self.d_model, self.image_token = vocab_size, d_model, image_token
        self.image_size, self.patch_size, self.shuffle, self.ratio = image_size, patch_size, shuffle, downsample_ratio
        self.normalize_embeddings = normalize_embeddings
        self.vision_embeddings = VisionEmbeddings(d_model, image_size, patch_size, in_chans)
        self.text_embeddings = nn.Embedding(text_vocab_size or vocab_size, d_model)
        self.special_embeddings = nn.Embedding(special_tokens, d_model) if special_tokens else None
        self.projector = None
        if shuffle is not None:
            wide = int(d_model / downsample_ratio**2)
            self.projector = nn.Sequential(Linear(wide, d_model), nn.GELU(), Linear(d_model, d_model))
        self.embedding = Stack(d_model, **embedding)
        self.language = Stack(d_model, **language)
        self.tok_embeddings = nn.Embedding(vocab_size, d_model)  # in the format, and not used
        self.norm = RMSNorm(d_model, language.get("eps", 1e-5))
        self.output = Linear(d_model, vocab_size, bias=False)
        #: of a forward pass over text; images use "vision_embeddings" and "projector" too
        self.unused_parameters: tuple[str, ...] = (
            "tok_embeddings", "vision_embeddings", "projector", *(("special_embeddings",) if special_tokens else ()),
        )  # fmt: skip
        gated = all(stack.get("mixer", {}).get("use_gnorm", True) for stack in (embedding, language))
        #: how the original writes these weights: "released" (one matrix wvkqgdt a mixer, with its gate) or "training"
        self.reference_form = "released" if gated else "training"
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for table in (self.text_embeddings, self.special_embeddings, self.tok_embeddings):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        vision = self.vision_embeddings
        nn.init.normal_(vision.position_embedding, std=0.02)  # the original's 1 hides the patches until it is trained
        # 0.02, the original's, for patches of 14 x 14
        nn.init.normal_(vision.patch_embedding.weight, std=0.5 * vision.patch_embedding.weight[0].numel() ** -0.5)

    # -- sizes

    @property
    def patches_per_tile(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of a tile in the language stack."""
        return self.patches_per_tile if self.shuffle is None else int(self.patches_per_tile * self.ratio**2)

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    # -- what goes in

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token ids (...) to (..., D)."""
        known = self.text_embeddings.weight.shape[0]
        special = ids >= known
        x = self.text_embeddings(ids.masked_fill(special, 0))
        if self.special_embeddings is None:
            return x
        other = self.special_embeddings((ids - known).masked_fill(~special, 0))
        return torch.where(special[..., None], other, x)

    def embed_tiles(self, pixel_values: Tensor) -> Tensor:
        """Tiles (n, channels, H, W) or (batch, n, channels, H, W) to image tokens of the embedding stack, (n, tokens,
        D)."""
        if pixel_values.dim() == 5:
            pixel_values = pixel_values.flatten(0, 1)
        channels = self.vision_embeddings.patch_embedding.in_channels
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (tiles, {channels}, height, width) or "
                f"(batch, tiles, {channels}, height, width)"
            )
        x = self.vision_embeddings(pixel_values)
        return self.projected(x) if self.shuffle == "pre" else x

    def projected(self, x: Tensor) -> Tensor:
        assert self.projector is not None
        return self.projector(pixel_shuffle(x, self.ratio))

    def place(self, ids: Tensor, x: Tensor, image: Tensor) -> Tensor:
        """``x`` with the image tokens (n, tokens, D) at the places of ``image_token``, in order."""
        mask = ids == self.image_token
        self._check_count(int(mask.sum()) if _concrete(ids) else None, image.shape[0] * image.shape[1])
        return x.masked_scatter(mask[..., None], image.to(x.dtype))

    def _check_count(self, places: int | None, tokens: int) -> None:
        if places is not None and places != tokens:
            raise ValueError(
                f"the text has {places} places for image tokens (id {self.image_token}), the tiles give {tokens}; "
                f"write {self.tokens_per_tile} of them for each tile"
            )

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; expected integers (batch, length)")
        if _concrete(ids) and ids.numel():
            low, high = (int(t) for t in ids.aminmax())
            # The original reads row 0 for ids behind its table where it has no second one; so do we.
            extra = None if self.special_embeddings is None else self.special_embeddings.weight.shape[0]
            most = None if extra is None else self.text_embeddings.weight.shape[0] + extra
            if low < 0 or (most is not None and high >= most):
                expected = "0 or more" if most is None else f"0 to {most - 1}"
                raise ValueError(f"{name} holds the token {low if low < 0 else high}; expected {expected}")

    # -- whole texts

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        hd_input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        hd_position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, length, vocabulary).

        input_ids: (batch, length), with ``image_token`` where image tokens belong; pixel_values: tiles of all rows, in
        order, (tiles, channels, H, W) or (batch, tiles, channels, H, W), normalised. hd_input_ids: for the HD form with
        images, the same text with ``patches_per_tile`` places a tile. Position ids (1 or batch, length): of the softmax
        layers' phases; default: 0, 1, ... There is no padding mask, as in the original: rows have the same length.
        """
        return self.output(self.norm(self.hidden(input_ids, pixel_values, hd_input_ids, position_ids, hd_position_ids)))

    def hidden(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        hd_input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        hd_position_ids: Tensor | None = None,
        run: Run | None = None,
        found: dict[str, Tensor] | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """The language stack's output before its norm. ``run``: how layers run; ``found`` gets what lies between.

        padding: (batch, length), 0 at padding: what the original's softmax layers of the language stack leave out. No
        other layer knows of it there, so it does not make rows of different lengths right.
        """
        self._check_ids("input_ids", input_ids)
        ids, positions = input_ids, position_ids
        if self.shuffle == "post":
            self._check_hd(pixel_values, hd_input_ids)
            if hd_input_ids is not None:
                ids, positions = hd_input_ids, hd_position_ids
        x = self.embed_text(ids)
        if pixel_values is not None:
            x = self.place(ids, x, self.embed_tiles(pixel_values))
        x = self.embedding(x, positions=positions, run=run)
        if self.shuffle == "post" and hd_input_ids is not None:
            x = self.shorten(x, ids, input_ids)
        if self.normalize_embeddings:
            x = x / x.norm(dim=-1, keepdim=True)
        if found is not None:
            found["input_embeds_after_embedding_model"] = x
        return self.language(x, positions=position_ids, run=run, padding=padding)

    def _check_hd(self, pixel_values: Tensor | None, hd_input_ids: Tensor | None) -> None:
        if hd_input_ids is not None:
            self._check_ids("hd_input_ids", hd_input_ids)
        elif pixel_values is not None:
            raise ValueError(
                f"this is the HD form (shuffle='post'): give hd_input_ids, the text with {self.patches_per_tile} "
                f"places a tile, beside input_ids with {self.tokens_per_tile}"
            )

    def shorten(self, x: Tensor, hd_ids: Tensor, ids: Tensor) -> Tensor:
        """HD: the embedding stack's outputs (batch, HD length, D) to the language stack's inputs (batch, length, D)."""
        image, text = hd_ids == self.image_token, ids != self.image_token
        if _concrete(ids) and int((~image).sum()) != int(text.sum()):
            raise ValueError(
                f"hd_input_ids has {int((~image).sum())} tokens beside the image's, input_ids {int(text.sum())}; they "
                "are the same text"
            )
        short = self.projected(x[image].unflatten(0, (-1, self.patches_per_tile))).flatten(0, 1)
        self._check_count(int((~text).sum()) if _concrete(ids) else None, short.shape[0])
        out = x.new_zeros(*ids.shape, self.d_model).masked_scatter(text[..., None], x[~image])
        return out.masked_scatter(~text[..., None], short)

    # -- from a state

    def init_state(self, batch: int = 1) -> State:
        """The memory of ``batch`` texts of which nothing was read."""
        return State(self.embedding.init_state(batch), self.language.init_state(batch))

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        hd_input_ids: Tensor | None = None,
        state: State | None = None,
        chunk: int = 1024,
    ) -> State:
        """Read a text and its images; returns the state after it, with the next token's logits.

        Runs ``chunk`` tokens at a time, tiles becoming tokens as they are reached: memory beside the state does not
        grow with the length (in the HD form the embedding stack's outputs are kept). With ``state`` it goes on there.
        """
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; expected at least one token")
        self._check_ids("input_ids", input_ids)
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids holds no token; expected at least one")
        state = self.init_state(input_ids.shape[0]) if state is None else state
        if self.shuffle == "post":
            self._check_hd(pixel_values, hd_input_ids)
        hd = hd_input_ids is not None and self.shuffle == "post"
        ids = hd_input_ids if hd else input_ids
        assert ids is not None
        pieces: list[Tensor] = []
        for piece in self._embedded(ids, pixel_values, state, chunk):
            if hd:
                pieces.append(piece)
            else:
                self._read(piece, state)
        if hd:
            for piece in self.shorten(torch.cat(pieces, 1), ids, input_ids).split(chunk, dim=1):
                self._read(piece, state)
        return state

    def _embedded(self, ids: Tensor, pixel_values: Tensor | None, state: State, chunk: int) -> Iterator[Tensor]:
        """The embedding stack's outputs, ``chunk`` tokens at a time."""
        image = _Tiles(self, pixel_values, ids)
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            x = image.put(part, start, self.embed_text(part))
            x = self.embedding(x, state=state.embedding, before=state.embedding_position)
            state.embedding_position += part.shape[1]
            yield x

    def _read(self, x: Tensor, state: State) -> None:
        """Embedding outputs (batch, length, D) into the language stack."""
        if self.normalize_embeddings:
            x = x / x.norm(dim=-1, keepdim=True)
        x = self.language(x, state=state.language, before=state.position)
        state.position += x.shape[1]
        state.logits = self.output(self.norm(x[:, -1]))

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        """Read one token of each text, (batch,) ids; returns the next token's logits (batch, vocabulary)."""
        x = self.embedding.step(self.embed_text(token), state.embedding, state.embedding_position)
        state.embedding_position += 1
        if self.normalize_embeddings:
            x = x / x.norm(dim=-1, keepdim=True)
        x = self.language.step(x, state.language, state.position)
        state.position += 1
        state.logits = self.output(self.norm(x))
        return state.logits


class _Tiles:
    """A batch's tiles, made to tokens as a text that is read in pieces reaches them.

    Rows run side by side, so the tiles of each row are found first: by its places, in order.
    """

    def __init__(self, model: MmMamba, pixel_values: Tensor | None, ids: Tensor) -> None:
        self.model, self.mask = model, ids == model.image_token
        self.pixels = pixel_values
        if pixel_values is None:
            return
        if pixel_values.dim() == 5:
            self.pixels = pixel_values = pixel_values.flatten(0, 1)
        self.each = model.tokens_per_tile if model.shuffle == "pre" else model.patches_per_tile
        if pixel_values.dim() == 4 and pixel_values.shape[-1] != model.image_size:  # another size: as many as it gives
            self.each = model.embed_tiles(pixel_values[:1]).shape[1]
        counts = self.mask.sum(1)
        model._check_count(int(counts.sum()), pixel_values.shape[0] * self.each)
        self.first = (counts.cumsum(0) - counts).tolist()  # a row's first image token among all of the batch
        self.kept: dict[int, Tensor] = {}

    def put(self, ids: Tensor, start: int, x: Tensor) -> Tensor:
        """``x`` (batch, piece, D), embedded text, with the image tokens of this piece in their places."""
        here = self.mask[:, start : start + ids.shape[1]]
        if self.pixels is None or not bool(here.any()):
            return x
        wanted: list[int] = []
        for row, first in enumerate(self.first):
            begun = first + int(self.mask[row, :start].sum())
            wanted += range(begun, begun + int(here[row].sum()))
        tiles = sorted({token // self.each for token in wanted})
        self.kept = {t: self.kept[t] if t in self.kept else self._tile(t) for t in tiles}
        tokens = torch.stack([self.kept[t // self.each][t % self.each] for t in wanted])
        return x.masked_scatter(here[..., None], tokens.to(x.dtype))

    def _tile(self, index: int) -> Tensor:
        assert self.pixels is not None
        return self.model.embed_tiles(self.pixels[index : index + 1])[0]


def _concrete(x: Tensor) -> bool:
    """Whether values may be looked at: not while tracing."""
    return not torch.compiler.is_compiling() and type(x) is Tensor
