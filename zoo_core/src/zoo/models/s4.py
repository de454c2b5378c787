"""Deep sequence models of S4 layers: classifiers and language models.

Source: state-spaces/s4 ``src/models/sequence/backbones`` (SequenceModel, SequenceResidualBlock),
``src/tasks/decoders.py``, ``src/models/sequence/modules/ffn.py``. Parameter names are the original's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Recomputed
from zoo.layers.fft_conv import ActivatedLinear, FFTConv, S4Block, activation, dropout
from zoo.layers.s4nd import S4ND

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from .s4_parts import Named, Pool, SequenceNorm, make_residual, named

State = dict[str, Tensor]


class FeedForward(nn.Module):
    """Linear to ``expand * d_model``, activation, dropout, linear back; the same at every position."""

    def __init__(
        self,
        d_model: int,
        expand: float = 2,
        act: str | None = "gelu",
        dropout_p: float = 0.0,
        tie_dropout: bool = False,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        self.ff = nn.Sequential(
            ActivatedLinear(d_model, inner, act), dropout(dropout_p, tie_dropout), nn.Linear(inner, d_model)
        )

    def forward(self, x: Tensor, *, state: State | None = None, **_: Any) -> Tensor:
        return self.ff(x)

    def init_state(self, batch: int, **_: Any) -> State:
        return {}

    def step(self, x: Tensor, state: State) -> Tensor:
        return self.ff(x)


class NoLayer(nn.Module):
    """The input as it is: what remains of a block are its norm, its residual and its pooling."""

    def __init__(self, d_model: int, **_: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, *, state: State | None = None, **_: Any) -> Tensor:
        return x

    def init_state(self, batch: int, **_: Any) -> State:
        return {}

    def step(self, x: Tensor, state: State) -> Tensor:
        return x


LAYERS: dict[str, Any] = {
    "s4": S4Block, "fftconv": FFTConv, "ffn": FeedForward, "ff": FeedForward, "s4nd": S4ND, "id": NoLayer,
}  # fmt: skip


def make_layer(d_model: int, config: Mapping[str, Any]) -> nn.Module:
    """A layer from its configuration: ``type`` (s4, fftconv, ffn, s4nd, id) and the arguments of that class."""
    options = dict(config)
    kind = options.pop("type", "s4")
    if kind not in LAYERS:
        raise ValueError(f"layer type is {kind!r}; expected one of {', '.join(LAYERS)}")
    return LAYERS[kind](d_model, **options)


class SequenceBlock(Recomputed):
    """``residual(x, drop(layer(norm(x))))``, or with the norm after the residual; then, where given, a pool.

    ``residual``: True (a plain sum), None, or as in :data:`~zoo.models.s4_parts.RESIDUALS`; ``index``: number of the
    block, from 1, for residuals that depend on it. ``norm``: as :class:`~zoo.models.s4_parts.SequenceNorm`. ``pool``:
    as :class:`~zoo.models.s4_parts.Pool`. ``bidirectional``: a second layer sees the same input, not a flipped one,
    and both are mixed by a linear layer (so in the original).
    """

    def __init__(
        self, d_model: int, layer: Mapping[str, Any], *, prenorm: bool = True, norm: Named = "layer",
        transposed: bool = False, residual: bool | Named = True, bidirectional: bool = False, dropout_p: float = 0.0,
        tie_dropout: bool = False, pool: Named = None, index: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.prenorm, self.bidirectional = prenorm, bidirectional
        self.layer = make_layer(d_model, layer)
        if bidirectional:
            self.reverse_layer = make_layer(d_model, layer)
            self.bidirectional_linear = nn.Linear(2 * d_model, d_model)
        self.residual = make_residual(d_model, index, residual)
        self.norm = SequenceNorm(d_model, norm, transposed)
        self.drop = dropout(dropout_p, tie_dropout)
        self.pool: Pool | None = None
        if pool is not None:
            kind, options = named(pool, "pool")
            self.pool = Pool(d_model, kind, **options)
        self.d_output = d_model if self.pool is None else self.pool.d_output

    def _around(self, x: Tensor, mix: Any) -> Tensor:
        y = mix(self.norm(x) if self.prenorm else x)
        y = y if self.residual is None else self.residual(x, self.drop(y))
        y = y if self.prenorm else self.norm(y)
        return y if self.pool is None else self.pool(y)

    def forward(self, x: Tensor, *, state: State | None = None, **options: Any) -> Tensor:
        def mix(h: Tensor) -> Tensor:
            if not self.bidirectional:
                return self.layer(h, **({} if state is None else {"state": state}), **options)
            both = torch.cat([self.layer(h, **options), self.reverse_layer(h, **options)], dim=-1)
            return self.bidirectional_linear(both)

        if self.bidirectional and state is not None:
            raise ValueError("a bidirectional block has no state to continue from")
        return self._around(x, mix)

    def init_state(self, batch: int, **kind: Any) -> State:
        if self.bidirectional:
            raise ValueError("a bidirectional block cannot step; it has no state")
        if self.pool is not None:
            raise ValueError("a block that pools cannot step; give pool=None")
        return self.layer.init_state(batch, **kind)

    def step(self, x: Tensor, state: State) -> Tensor:
        return self._around(x, lambda h: self.layer.step(h, state))


class SequenceModel(nn.Module):
    """``n_layers`` repetitions of a list of layers, each in a residual block, and a last norm (with ``prenorm``).

    ``layer``: one layer configuration or a list of them (:func:`make_layer`), for example S4, S4, feed-forward.
    ``pool`` acts after every ``n_repeat``-th block. Other arguments: :class:`SequenceBlock`.
    Input and output: (batch, length, d_model) without pooling. Keys ``layers.{i}.{layer,norm.norm}.*``,
    ``norm.norm.*``.
    """

    def __init__(
        self,
        d_model: int,
        n_layers: int = 1,
        layer: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        prenorm: bool = True,
        norm: Named = "layer",
        transposed: bool = False,
        residual: bool | Named = True,
        bidirectional: bool = False,
        dropout_p: float = 0.0,
        tie_dropout: bool = False,
        dropinp: float = 0.0,
        n_repeat: int = 1,
        pool: Named = None,
    ) -> None:
        super().__init__()
        listed = [{}] if layer is None else [layer] if isinstance(layer, Mapping) else list(layer)
        self.d_model = d_model
        self.drop = dropout(dropinp, tie_dropout)
        blocks, width = [], d_model
        for i, one in enumerate(listed * n_layers * n_repeat, start=1):
            block = SequenceBlock(
                width, {"dropout_p": dropout_p, **one}, prenorm=prenorm, norm=norm, transposed=transposed,
                residual=residual, bidirectional=bidirectional, dropout_p=dropout_p, tie_dropout=tie_dropout,
                pool=pool if i % n_repeat == 0 else None, index=i,
            )  # fmt: skip
            blocks.append(block)
            width = block.d_output
        self.layers = nn.ModuleList(blocks)
        self.d_output = width
        self.norm = SequenceNorm(width, norm, transposed) if prenorm else nn.Identity()

    def forward(self, x: Tensor, *, state: list[State] | None = None, **options: Any) -> Tensor:
        """state: of :meth:`init_state`, continued and left at the end."""
        x = self.drop(x)
        for i, block in enumerate(self.layers):
            x = block(x, state=None if state is None else state[i], **options)
        return self.norm(x)

    def init_state(self, batch: int, **kind: Any) -> list[State]:
        return [block.init_state(batch, **kind) for block in self.layers]  # type: ignore[operator]

    def step(self, x: Tensor, state: list[State]) -> Tensor:
        """(batch, d_model) to the same; ``state`` is updated in place."""
        for block, own in zip(self.layers, state, strict=True):
            x = block.step(x, own)  # type: ignore[operator]
        return self.norm(x)


class SequenceDecoder(nn.Module):
    """Positions to outputs: the last (first) ``l_output`` of them, or means or sums up to each of the last ones.

    mode: "last", "first", "pool", "sum", or "ragged" (all positions up to the longest of ``lengths``). l_output None:
    every position; 0: one position, without its axis (for "pool" the mean over time). Then ``output_transform``, a
    linear to ``d_output`` (None: none).
    """

    MODES = ("last", "first", "pool", "sum", "ragged")

    def __init__(self, d_model: int, d_output: int | None, l_output: int | None = None, mode: str = "last") -> None:
        super().__init__()
        if mode not in self.MODES:
            raise ValueError(f"decoder mode is {mode!r}; expected one of {', '.join(self.MODES)}")
        self.l_output, self.mode = l_output, mode
        self.output_transform = nn.Identity() if d_output is None else nn.Linear(d_model, d_output)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, length, d_model) to (batch, l_output, d_output). lengths: positions that count, from the start."""
        return self.output_transform(self.restrict(x, lengths))

    def restrict(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self.mode == "ragged":
            if lengths is None:
                raise ValueError("a decoder of mode 'ragged' needs lengths, the positions that count of each sequence")
            x = x[:, : int(lengths.max())]
            return x[:, 0] if self.l_output == 0 else x
        if self.l_output is None and lengths is not None:
            if bool((lengths != lengths[0]).any()):
                raise ValueError(
                    f"lengths is {lengths.tolist()}; a decoder of every position (l_output None) needs equal lengths"
                )
            x = x[:, : int(lengths[0])]
        count = {None: x.shape[1], 0: 1}.get(self.l_output, self.l_output)
        assert count is not None
        end = torch.full((x.shape[0],), x.shape[1], device=x.device) if lengths is None else lengths.to(x.device)
        if self.mode == "first":
            y = x[:, :count]
        else:
            at = (end[:, None] - count + torch.arange(count, device=x.device)).clamp(min=0)[..., None]
            if self.mode == "last":
                y = x.gather(1, at.expand(-1, -1, x.shape[2]))
            elif count == 1:
                seen = torch.arange(x.shape[1], device=x.device)[None, :, None] < end[:, None, None]
                y = torch.where(seen, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(1, keepdim=True)
                y = y / end[:, None, None].to(y.dtype) if self.mode == "pool" else y
            else:
                y = x.cumsum(1).gather(1, at.expand(-1, -1, x.shape[2]))
                y = y / (at + 1).to(y.dtype) if self.mode == "pool" else y
        return y[:, 0] if self.l_output == 0 else y


class MeanDecoder(nn.Module):
    """Mean over all positions of a sequence, image or video ("full": every position), then ``output_transform``."""

    def __init__(self, d_model: int, d_output: int | None, mode: str = "pool") -> None:
        super().__init__()
        if mode not in ("pool", "full"):
            raise ValueError(f"decoder mode is {mode!r}; expected 'pool' or 'full'")
        self.mode = mode
        self.output_transform = nn.Identity() if d_output is None else nn.Linear(d_model, d_output)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *sizes, d_model) to (batch, d_output), or of every position."""
        return self.output_transform(x.flatten(1, -2).mean(1) if self.mode == "pool" else x)


class RetrievalHead(nn.Module):
    """Whether two documents belong together: features a, b to [a, b, a - b, a * b], linear, activation, linear (nli);
    or [a, b] and three linear layers. The batch holds all first documents, then all second ones."""

    def __init__(self, d_input: int, d_model: int, num_classes: int, nli: bool = True, act: str = "relu") -> None:
        super().__init__()
        self.nli = nli
        if nli:
            parts = [nn.Linear(4 * d_input, d_model), activation(act), nn.Linear(d_model, num_classes)]
        else:
            parts = [
                nn.Linear(2 * d_input, d_model), activation(act), nn.Linear(d_model, d_model // 2), activation(act),
                nn.Linear(d_model // 2, num_classes),
            ]  # fmt: skip
        self.classifier = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            raise ValueError(
                f"the batch holds {x.shape[0]} documents; expected pairs, first documents before second ones"
            )
        a, b = x.chunk(2)
        return self.classifier(torch.cat([a, b, a - b, a * b] if self.nli else [a, b], dim=-1))


class RetrievalDecoder(nn.Module):
    """:class:`SequenceDecoder` features of both documents, then :class:`RetrievalHead`."""

    def __init__(
        self, d_model: int, num_classes: int, d_hidden: int | None = None, nli: bool = True, act: str = "relu",
        mode: str = "last",
    ) -> None:  # fmt: skip
        super().__init__()
        self.feature = SequenceDecoder(d_model, None, 0, mode)
        self.retrieval = RetrievalHead(d_model, d_hidden or d_model, num_classes, nli, act)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.retrieval(self.feature(x, lengths))


class S4SequenceClassifier(GradCheckpointing, nn.Module):
    """Encoder, :class:`SequenceModel`, decoder: a class for a whole sequence.

    ``d_input``: features of a position (linear encoder), or with ``vocab`` the number of tokens (embedding).
    ``num_classes`` 0: pooled features. ``retrieval``: pairs of documents (first ones, then second ones).
    Further arguments: :class:`SequenceModel`. Source: Gu et al., arXiv 2111.00396, section 4 and appendix D.
    """

    def __init__(
        self,
        d_input: int = 1,
        num_classes: int = 10,
        d_model: int = 256,
        n_layers: int = 4,
        *,
        vocab: bool = False,
        mode: str = "pool",
        retrieval: bool = False,
        **model: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.mode = num_classes, d_model, mode
        self.encoder: nn.Module = nn.Embedding(d_input, d_model) if vocab else nn.Linear(d_input, d_model)
        self.model = SequenceModel(d_model, n_layers, **model)
        self.decoder: nn.Module
        if retrieval:
            self.decoder = RetrievalDecoder(d_model, num_classes, mode=mode)
        else:
            self.decoder = SequenceDecoder(d_model, num_classes or None, 0, mode)
        self.mixes_batch = retrieval

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, length, d_input), or (batch, length) tokens, to (batch, num_classes) logits.

        lengths: (batch,) positions that count; what follows is zeros to every S4 layer and is not pooled.
        """
        options = {} if lengths is None else {"lengths": lengths}
        return self.decoder(self.model(self.encoder(x), **options), lengths)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for ``num_classes``; 0: pooled features."""
        self.num_classes = num_classes
        kind = next(self.model.parameters())
        decoder = SequenceDecoder(self.num_features, num_classes or None, 0, self.mode)
        self.decoder = decoder.to(device=kind.device, dtype=kind.dtype)


class S4LanguageModel(GradCheckpointing, nn.Module):
    """Next-token model with adaptive embedding and softmax, as S4 was trained on WikiText-103.

    ``vocab_size`` tokens, sorted by frequency, in clusters that end at ``cutoffs``; each is ``div_val`` times narrower
    than the one before. ``layer``: as :class:`SequenceModel`. forward gives log-probabilities of all tokens; ``loss``
    the mean negative log-likelihood without forming them. Keys ``encoder.0.*``, ``model.*``, ``loss.*``.
    Source: Gu et al., arXiv 2111.00396, section 4.2; Baevski and Auli, arXiv 1809.10853.
    """

    def __init__(
        self, vocab_size: int, cutoffs: Sequence[int], d_model: int = 1024, n_layers: int = 16, *, div_val: int = 4,
        tie_weights: bool = True, tie_projs: Sequence[bool] | None = None, **model: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        embedding = AdaptiveEmbedding(vocab_size, d_model, cutoffs, div_val)
        self.encoder = nn.Sequential(embedding)
        self.model = SequenceModel(d_model, n_layers, **model)
        self.loss = AdaptiveSoftmax(embedding, tie_weights=tie_weights, tie_projs=tie_projs)

    def forward(self, tokens: Tensor, *, state: list[State] | None = None) -> Tensor:
        """(batch, length) int64 to (batch, length, vocab_size) log-probabilities of the next token.

        state (of :meth:`init_state`): continued and left at the end of this piece.
        """
        return self.loss.log_probabilities(self.model(self.encoder(tokens), state=state))

    def negative_log_likelihood(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(batch, length) each, to (batch, length) nats."""
        return self.loss(self.model(self.encoder(tokens)), targets)

    def init_state(self, batch: int, **kind: Any) -> list[State]:
        return self.model.init_state(batch, **kind)

    def step(self, tokens: Tensor, state: list[State]) -> Tensor:
        """(batch,) tokens to (batch, vocab_size) log-probabilities; ``state`` is updated in place."""
        return self.loss.log_probabilities(self.model.step(self.encoder(tokens), state))


def s4_sequence_classifier(**config: Any) -> S4SequenceClassifier:
    """An :class:`S4SequenceClassifier`; see there for the arguments."""
    return S4SequenceClassifier(**config)


def s4_language_model(**config: Any) -> S4LanguageModel:
    """An :class:`S4LanguageModel`; see there for the arguments."""
    return S4LanguageModel(**config)
