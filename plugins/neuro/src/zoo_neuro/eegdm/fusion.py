"""The latent fusion transformer (LFT): learned tokens read the latents layer by layer, then are classified.

Source: arXiv 2508.14086, section III; jhpuah/EEGDM ``LatentActivityDecoder``, ``TransformerClassifier``, ``Classifier``
and the ablations in ``src/extra``.
Differs from the original: pools, which one stack reads one after another there, are one batch here (the same numbers);
``n_ap_clst``, with which the original cannot run, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.adapting import NewHead
from zoo.layers import GradCheckpointing, Linear

from .attention import AttentionStack, small_normal_
from .backbone import DiffusionBackbone
from .latents import FOLD, LatentExtractor, LatentReducer
from .preparation import TCP, Preparation


def _parity(channel: str) -> int:
    """The side of the head: 1 left (odd electrodes), 0 right."""
    first = channel.split("-")[0]
    if not first[-1:].isdigit():
        raise ValueError(f"{channel!r} has no side: its first electrode ends in no digit; ch_pos_emb_sym needs one")
    return int(first[-1]) % 2


def _token(*shape: int, init_weight: bool) -> nn.Parameter:
    """Uniform in [0, 1), or small and normal."""
    return nn.Parameter(small_normal_(torch.empty(shape)) if init_weight else torch.rand(shape))


class LatentDecoder(nn.Module):
    """``n_clst`` tokens for each tower T and pool P, which every layer's stack updates from that layer's latents.

    Arguments: ``d_model`` of the latents, ``width_factor`` (of the reducer), ``n_layer``, ``d_embed`` of the tokens
    (None: the latents' width); ``embed_query`` with ``d_query_embed``: a linear layer for each query first;
    ``have_ch_pos_embed``: a vector for each EEG channel, or each side of the head (``ch_pos_emb_sym`` "mirror"),
    added or, with ``cat_ch_pos_embed``, appended; ``clst_dim``, ``clst_pos_embed_dim``: letters of T and P, along which
    tokens and their positions differ; ``stack_struct`` and ``across_pool_stack_struct`` (between pools, after each
    layer): :class:`~zoo_neuro.eegdm.attention.AttentionStack`. forward: (B, n, T, P, Q, C, H) to (B, T, P, N, d_embed).
    """

    def __init__(
        self,
        d_model: int,
        width_factor: int,
        n_layer: int,
        d_embed: int | None = None,
        *,
        init_weight: bool = False,
        n_query: int = 1,
        embed_query: bool = False,
        d_query_embed: int | None = None,
        have_ch_pos_embed: bool = False,
        cat_ch_pos_embed: bool = False,
        ch_pos_emb_sym: str | None = None,
        ch_order: Sequence[str] = TCP,
        clst_dim: str = "",
        clst_pos_embed_dim: str = "N",
        n_clst: int = 4,
        n_pool: int = 5,
        pool_merge: str = "share",
        multi_query_merge: str = "seq",
        stack_struct: str = "scf",
        num_heads: int = 8,
        ff: int = 4,
        dropout: float = 0.0,
        have_crossnorm: bool = True,
        across_pool_stack_struct: str | None = "",
    ) -> None:
        super().__init__()
        width = d_model * width_factor
        self.n_query, self.multi_query_merge = n_query, multi_query_merge
        self.query_embed_linear: nn.ModuleList | None = None
        if embed_query:
            if width_factor != (n_query if multi_query_merge == "cat" and n_query > 1 else 1):
                raise ValueError("embed_query embeds single pools; with pool_merge='cat' it cannot run")
            width = d_query_embed or d_model
            self.query_embed_linear = nn.ModuleList(Linear(d_model, width) for _ in range(n_query))
        self.have_ch_pos_embed, self.cat_ch_pos_embed = have_ch_pos_embed, cat_ch_pos_embed
        self.ch_pos_embed_idx: Tensor | None
        self.register_buffer("ch_pos_embed_idx", None)
        if have_ch_pos_embed:
            if ch_pos_emb_sym not in (None, "mirror"):
                raise ValueError(f"ch_pos_emb_sym is {ch_pos_emb_sym!r}; expected None or 'mirror'")
            count = len(ch_order)
            if ch_pos_emb_sym == "mirror":
                count = 2
                self.register_buffer("ch_pos_embed_idx", torch.tensor([_parity(name) for name in ch_order]))
            self.ch_pos_embed_raw = _token(1, 1, 1, 1, 1, count, width, init_weight=init_weight)
            width *= 2 if cat_ch_pos_embed else 1
        self.d_embed = d_embed = width if d_embed is None else d_embed
        self.n_pool = {"mix": n_pool * len(ch_order), "cat": 1, "share": n_pool}[pool_merge]
        self.n_tower = n_query if multi_query_merge == "ind" else 1
        self.p_pos_embed = self.t_pos_embed = None
        if self.n_pool > 1 and "P" in clst_pos_embed_dim:
            self.p_pos_embed = _token(1, 1, self.n_pool, 1, d_embed, init_weight=init_weight)
        if self.n_tower > 1:
            self.t_pos_embed = _token(1, self.n_tower, 1, 1, d_embed, init_weight=init_weight)
        towers = self.n_tower if "T" in clst_dim else 1
        pools = self.n_pool if "P" in clst_dim else 1
        self.cls_token = _token(1, towers, pools, n_clst, d_embed, init_weight=init_weight)

        if stack_struct.count("c") * self.n_tower != n_query:
            raise ValueError(
                f"stack_struct {stack_struct!r} reads {stack_struct.count('c')} queries in each of {self.n_tower} "
                f"towers, and there are {n_query}; give as many letters c as a tower has queries"
            )
        if "s" in stack_struct and self.cls_token.numel() <= d_embed:
            raise ValueError("stack_struct has self attention and there is a single token; give n_clst of 2 or more")
        if multi_query_merge == "cat" and n_query > 1:
            raise ValueError(f"multi_query_merge is 'cat' for {n_query} queries; the original cannot run it: use 'seq'")
        if "c" in (across_pool_stack_struct or ""):
            raise ValueError(f"across_pool_stack_struct is {across_pool_stack_struct!r}; expected s and f, no c")
        self.have_across = bool(across_pool_stack_struct)
        kind: dict[str, Any] = {"dropout": dropout, "crossnorm": have_crossnorm, "init_weight": init_weight}
        self.tower, self.across_pool_tower = nn.ModuleList(), nn.ModuleList()
        for _ in range(self.n_tower):
            layers, between, depth = nn.ModuleList(), nn.ModuleList(), 0
            for _ in range(n_layer):
                layers.append(AttentionStack(d_embed, width, num_heads, ff, stack_struct, depth=depth, **kind))
                depth += stack_struct.count("f")
                if across_pool_stack_struct:
                    struct = across_pool_stack_struct
                    between.append(AttentionStack(d_embed, width, num_heads, ff, struct, depth=depth, **kind))
                    depth += struct.count("f")
            self.tower.append(layers)
            if self.have_across:
                self.across_pool_tower.append(between)
        self.depth = depth

    def _embed(self, tokens: Tensor) -> Tensor:
        """Queries through their linear layers; channels with their positions."""
        if self.query_embed_linear is not None:
            axis = {"cat": -1, "seq": -3, "ind": 2}[self.multi_query_merge]
            parts = tokens.chunk(self.n_query, dim=axis)
            tokens = torch.cat([f(x) for f, x in zip(self.query_embed_linear, parts, strict=True)], dim=axis)
        if not self.have_ch_pos_embed:
            return tokens
        where = self.ch_pos_embed_raw
        if self.ch_pos_embed_idx is not None:
            where = where[..., self.ch_pos_embed_idx, :]
        if where.shape[-2] != tokens.shape[-2]:
            raise ValueError(f"there are {tokens.shape[-2]} channels of tokens and {where.shape[-2]} channel positions")
        if self.cat_ch_pos_embed:
            return torch.cat([tokens, where.expand(*tokens.shape[:-2], -1, -1)], dim=-1)
        return tokens + where

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self._embed(tokens)
        batch, depth, towers, given = tokens.shape[:4]
        if depth != len(self.tower[0]) or towers != self.n_tower or given > self.n_pool:  # type: ignore[arg-type]
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; expected (batch, {len(self.tower[0])}, {self.n_tower}, up "  # type: ignore[arg-type]
                f"to {self.n_pool}, queries, channels, width)"
            )
        x = self.cls_token.expand(-1, self.n_tower, self.n_pool, -1, -1)
        for where in (self.t_pos_embed, self.p_pos_embed):
            x = x if where is None else x + where
        x = x.expand(batch, -1, -1, -1, -1)
        found = []
        for t, layers in enumerate(self.tower):
            h = x[:, t]
            # Pools beyond those that have tokens (mixed pools, shorter signals) keep what they are.
            rest = h[:, given:]
            h = h[:, :given]
            for n, layer in enumerate(layers):  # type: ignore[arg-type]
                h = layer(h.flatten(0, 1), tokens[:, n, t].flatten(0, 1)).unflatten(0, (batch, given))
                if self.have_across:
                    h = self.across_pool_tower[t][n](torch.cat([h, rest], dim=1).flatten(1, 2))  # type: ignore[index]
                    h = h.unflatten(1, (self.n_pool, -1))
                    h, rest = h[:, :given], h[:, given:]
            found.append(torch.cat([h, rest], dim=1))
        return torch.stack(found, dim=1)


class TokenClassifier(nn.Module):
    """Positions, a stack of attention, one vector of all tokens, a linear layer to the classes.

    ``shape``: the axes of the tokens, (T, P, N) or one, all but batch and width ``d_embed``. ``pos_embed``: the shape
    of the positions, None for none. ``stack_struct``: None for no stack. ``final_act``: "pool" (mean of the tokens),
    "cat" (all of them), "cls" (the first).
    """

    def __init__(
        self,
        shape: Sequence[int],
        d_embed: int,
        *,
        pos_embed: Sequence[int] | None,
        stack_struct: str | None = "sfsfsfsf",
        num_heads: int = 8,
        ff: int = 4,
        dropout: float = 0.0,
        depth: int = 0,
        final_act: str = "pool",
        init_weight: bool = False,
        n_class: int = 6,
        crossnorm: bool = True,
    ) -> None:
        super().__init__()
        if final_act not in ("pool", "cat", "cls"):
            raise ValueError(f"final_act is {final_act!r}; expected 'pool', 'cat' or 'cls'")
        if "c" in (stack_struct or ""):
            raise ValueError(f"classifier_stack_struct {stack_struct!r} has cross attention, c; use s and f")
        self.final_act, self.init_weight = final_act, init_weight
        self.pos_embed = None if pos_embed is None else _token(*pos_embed, init_weight=init_weight)
        self.stack = None
        if stack_struct is not None:
            self.stack = AttentionStack(
                d_embed, d_embed, num_heads, ff, stack_struct, dropout=dropout, crossnorm=crossnorm,
                init_weight=init_weight, depth=depth,
            )  # fmt: skip
        self.num_features = torch.Size(shape).numel() * d_embed if final_act == "cat" else d_embed
        self.linear: nn.Module
        self.reset(n_class)

    def reset(self, n_class: int) -> None:
        """A new linear layer for ``n_class`` outputs (0: none)."""
        if n_class == 0:
            self.linear = nn.Identity()
            return
        like = next(self.parameters(), None)
        kind = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.linear = nn.Linear(self.num_features, n_class, **kind)
        if self.init_weight:
            small_normal_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def features(self, x: Tensor) -> Tensor:
        """Tokens (batch, ..., d_embed) to (batch, num_features)."""
        x = x if self.pos_embed is None else x + self.pos_embed
        x = x.flatten(1, -2)
        x = x if self.stack is None else self.stack(x)
        if self.final_act == "pool":
            return x.mean(1)
        return x.flatten(1) if self.final_act == "cat" else x[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


class EEGClassifier(GradCheckpointing, nn.Module):
    """EEGDM: a frozen backbone's latents, fused and classified. The class of a multi-channel window of EEG.

    Arguments: ``backbone`` (a :class:`~zoo_neuro.eegdm.backbone.DiffusionBackbone` or its arguments); the extractor's
    ``start``, ``end``, ``diffusion_t``, ``query``, ``use_cond``; ``fwd_with_noise``: None takes the signal as it is,
    False scales it as at step diffusion_t, True adds the noise of that step, too, in training; the reducer's
    ``reduce``, ``rescale``, ``L``,
    ``window_size``, ``window_step``, ``pool_merge``, ``multi_query_merge``; the decoder's (see
    :class:`LatentDecoder`); the classifier's ``classifier_*`` and ``n_class`` (1: a yes or no). ``fusion``: "lft", or
    the ablations "mean" (the layers' mean) and "none" (all layers' tokens), which have no decoder and never fold.
    ``preparation``: arguments of :class:`~zoo_neuro.eegdm.preparation.Preparation`, what its input is made of.

    forward: signals (batch, channels, samples), optionally ``local`` (batch, channels, F, W) and ``rate``, by which the
    step of the S4 kernels is multiplied, for signals of L * rate samples (0.95 is the authors' for 190 Hz instead of
    200); returns (batch, n_class) logits. Source: arXiv 2508.14086.
    """

    ends: ClassVar[dict[str, NewHead]] = {"n_class": NewHead("classifier.linear")}

    def __init__(
        self,
        backbone: DiffusionBackbone | Mapping[str, Any] | None = None,
        *,
        start: int = 0,
        end: int | None = None,
        diffusion_t: int = 1,
        fwd_with_noise: bool | None = None,
        query: Sequence[str] = ("inter",),
        reduce: Sequence[str] = ("mean",),
        rescale: bool = False,
        L: int = 1000,
        window_size: int = 200,
        window_step: int = 200,
        pool_merge: str = "share",
        multi_query_merge: str = "seq",
        use_cond: Sequence[int] | None = None,
        n_clst: int = 4,
        ch_order: Sequence[str] = TCP,
        num_heads: int = 8,
        ff: int = 4,
        dropout: float = 0.0,
        init_weight: bool = False,
        have_crossnorm: bool = True,
        n_ap_clst: int = 0,
        ap_clst_dim: str = "T",
        classifier_use_ap_clst: bool = False,
        classifier_have_pos_embed: bool = False,
        classifier_pos_embed_dim: str = "TP",
        classifier_stack_struct: str | None = "sfsfsfsf",
        classifier_final_act: str = "pool",
        n_class: int = 6,
        fusion: str = "lft",
        preparation: Mapping[str, Any] | None = None,
        **decoder: Any,
    ) -> None:
        super().__init__()
        if n_ap_clst or classifier_use_ap_clst:
            raise ValueError("n_ap_clst and classifier_use_ap_clst cannot run in the original and are not supported")
        if fusion not in ("lft", "mean", "none"):
            raise ValueError(f"fusion is {fusion!r}; expected 'lft', 'mean' or 'none'")
        model = backbone if isinstance(backbone, DiffusionBackbone) else DiffusionBackbone(**(backbone or {}))
        self.fusion, self.fwd_with_noise, self.ch_order = fusion, fwd_with_noise, tuple(ch_order)
        self.schedule = model.schedule
        self.diffusion_t = self.schedule.checked(diffusion_t)
        self.preparation = Preparation(**{"samples": L, **(preparation or {})})
        fold = FOLD if fusion == "lft" else None
        self.extractor = LatentExtractor(model, start, end, diffusion_t, query, use_cond, fold)
        self.reducer = LatentReducer(query, reduce, rescale, L, window_size, window_step, pool_merge, multi_query_merge)
        shared: dict[str, Any] = {
            "num_heads": num_heads, "ff": ff, "dropout": dropout, "init_weight": init_weight,
        }  # fmt: skip
        depth, d_embed, shape = 0, model.d_model, [0]
        self.decoder: LatentDecoder | None = None
        if fusion == "lft":
            self.decoder = LatentDecoder(
                model.d_model, self.reducer.width_factor, self.extractor.n_layer, n_query=self.reducer.n_query,
                n_pool=self.reducer.n_pool, pool_merge=pool_merge, multi_query_merge=multi_query_merge, n_clst=n_clst,
                ch_order=ch_order, have_crossnorm=have_crossnorm, **shared, **decoder,
            )  # fmt: skip
            depth, d_embed = self.decoder.depth, self.decoder.d_embed
            shape = [self.decoder.n_tower, self.decoder.n_pool, n_clst]
            axes = zip("TPN", shape, strict=True)
            positions = [1, *(size if axis in classifier_pos_embed_dim else 1 for axis, size in axes), d_embed]
        else:
            if "N" not in classifier_pos_embed_dim:
                raise ValueError("classifier_pos_embed_dim lacks N, with which the original's ablations cannot run")
            layers = self.extractor.n_layer if fusion == "none" else 1
            shape = [layers * self.reducer.n_pool * self.reducer.n_query * self.extractor.channels]
            # The letters T and P act on the axes that lie at their places in (1, tokens, width).
            axes = zip("TP", [*shape, d_embed], strict=True)
            positions = [1, *(size if axis in classifier_pos_embed_dim else 1 for axis, size in axes)]
        if not classifier_have_pos_embed or torch.Size(positions).numel() == d_embed:
            positions = []
        self.classifier = TokenClassifier(
            shape, d_embed, pos_embed=positions or None, depth=depth, n_class=n_class,
            stack_struct=classifier_stack_struct, final_act=classifier_final_act, crossnorm=have_crossnorm, **shared,
        )  # fmt: skip
        self.num_classes, self.num_features = n_class, self.classifier.num_features

    @property
    def channel_names(self) -> list[str]:
        """Names of the EEG channels, in the order of the input."""
        return self.preparation.names(self.extractor.cond.flatten().tolist())

    @property
    def n_class(self) -> int:
        """``num_classes`` under the name of the argument."""
        return self.num_classes

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for ``num_classes`` outputs (0: none)."""
        self.num_classes = num_classes
        self.classifier.reset(num_classes)

    def tokens(self, signals: Tensor, local: Tensor | None = None, rate: float = 1.0) -> Tensor:
        """What the frozen backbone says, (batch, n, T, P, Q, C, H): worth keeping while the rest is trained."""
        if self.fwd_with_noise is not None:
            noisy = self.fwd_with_noise and self.training
            noise = torch.randn_like(signals) if noisy else torch.zeros_like(signals)
            at = torch.full((signals.shape[0],), self.diffusion_t, dtype=torch.long, device=signals.device)
            signals = self.schedule.add_noise(signals, noise, at)
        return self.reducer(self.extractor(signals, local, rate), rate)

    def represent(self, tokens: Tensor) -> Tensor:
        """Tokens of :meth:`tokens` to those that are classified: (B, T, P, N, H), or (B, tokens, H) in an ablation."""
        if self.decoder is not None:
            return self.decoder(tokens)
        flat = tokens.flatten(2, -2)
        return flat.mean(1) if self.fusion == "mean" else flat.flatten(1, 2)

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Logits from kept tokens, of the layers that this model reads, or of all the backbone's layers."""
        depth = len(self.extractor.model.layers)
        if tokens.shape[1] == depth and self.fusion == "lft":
            tokens = tokens[:, self.extractor.start : self.extractor.end]
        return self.classifier(self.represent(tokens))

    def forward(self, signals: Tensor, local: Tensor | None = None, rate: float = 1.0) -> Tensor:
        return self.classifier(self.represent(self.tokens(signals, local, rate)))
