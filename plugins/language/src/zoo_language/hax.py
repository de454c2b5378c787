"""HAX: Mamba or Mamba-2 blocks with a sparse attention branch beside the scan, and what reads its original.

Paper: Zhan et al., "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse Attention",
arXiv 2507.00449. Original: DeepGraphLearning/HAX @ 73d3c18 (``src/modeling_enhanced_mamba.py``,
``modeling_enhanced_mamba2.py``). Differs: texts shorter than the budget work with key selection too, and there is a
causal form that is read in pieces (``causal=True``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import placement
from zoo.layers import Mamba, Mamba2, RMSNorm
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules
from zoo_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step, ssd, ssd_step

from ._base import Block, CausalLM, Rereading, normed
from .hax_sparse import Pattern, SparseAttention
from .hax_task import JointRecallReplay
from .state import LayerState, State


class HaxMamba(Mamba):
    """A Mamba mixer whose scan is joined by :class:`SparseAttention` over the convolution's output."""

    def __init__(self, d_model: int, sparse: Mapping[str, Any], **ssm: Any) -> None:
        super().__init__(d_model, **ssm)
        self.sparse = SparseAttention(self.d_inner, self.d_state, **sparse)
        self.cache = self.sparse.cache

    def init_state(self, batch: int, *, device=None, dtype=None) -> LayerState:
        kind = {"device": device, "dtype": dtype}
        return super().init_state(batch, **kind) | self.sparse.init_state(batch, **kind)

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        **sparse: Any,
    ) -> Tensor:
        """(batch, length, D) to the same. mask (batch, length): False rows give the scan zeros."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        keep = state is not None
        h, conv = causal_conv1d(
            _masked(x, mask), self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu", lengths=lengths,
            initial_state=None if state is None else state["conv"], return_final_state=keep,
        )  # fmt: skip
        h = _masked(h, mask)
        dt, B, C = self.x_proj(h).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm = selective_scan(
            h, dt, -torch.exp(self.A_log.float()), B, C, self.D.float(), z, self.dt_proj.bias.float(),
            dt_proj=self.dt_proj.weight, dt_softplus=True, lengths=lengths,
            initial_state=None if state is None else state["ssm"], return_final_state=keep,
        )  # fmt: skip
        attended = self.sparse(h, state=state, position=position, lengths=lengths, mask=mask, **sparse)
        if state is not None:
            _keep(state, conv, ssm)
        return self.out_proj(y + attended * F.silu(z))

    def step(self, u: Tensor, state: LayerState, position: Tensor) -> Tensor:  # type: ignore[override]
        """One token, (batch, D); ``position`` (batch,) tokens were read before."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        h = causal_conv1d_step(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, state=state["conv"], activation="silu"
        )
        dt, B, C = self.x_proj(h).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan_step(
            h, dt @ self.dt_proj.weight.t(), -torch.exp(self.A_log.float()), B, C, self.D.float(), z,
            self.dt_proj.bias.float(), state=state["ssm"], dt_softplus=True,
        )  # fmt: skip
        attended = self.sparse(h[:, None], state=state, position=position)[:, 0]
        return self.out_proj(y + attended * F.silu(z))


class HaxMamba2(Mamba2):
    """A Mamba-2 mixer with the same branch over its x; the gated norm is over all channels, whatever ``ngroups``."""

    def __init__(self, d_model: int, sparse: Mapping[str, Any], **ssm: Any) -> None:
        super().__init__(d_model, **ssm)
        assert self.norm is not None
        self.norm.groups = 1
        self.sparse = SparseAttention(self.d_ssm, self.d_state, **sparse)
        self.cache = self.sparse.cache

    def init_state(self, batch: int, *, device=None, dtype=None) -> LayerState:
        kind = {"device": device, "dtype": dtype}
        return super().init_state(batch, **kind) | self.sparse.init_state(batch, **kind)

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        **sparse: Any,
    ) -> Tensor:
        """(batch, length, D) to the same. mask: as in :class:`HaxMamba`; the original ignores it for a single text."""
        own = mask if u.shape[0] > 1 and u.shape[1] > 1 else None
        z0, x0, z, xBC, dt = self._split(_masked(u, own))
        keep = state is not None
        xBC, conv = causal_conv1d(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu", lengths=lengths,
            initial_state=None if state is None else state["conv"], return_final_state=keep,
        )  # fmt: skip
        x, B, C = self._parts(_masked(xBC, own))
        y, ssm = ssd(
            x, dt, -torch.exp(self.A_log.float()), B, C, self._skip(), dt_bias=self.dt_bias.float(), dt_softplus=True,
            dt_limit=self.dt_limit, lengths=lengths, initial_state=None if state is None else state["ssm"],
            return_final_state=keep,
        )  # fmt: skip
        attended = self.sparse(x.flatten(-2), state=state, position=position, lengths=lengths, mask=mask, **sparse)
        if state is not None:
            _keep(state, conv, ssm)
        return self._finish(y.flatten(-2) + attended, z, z0, x0)

    def step(self, u: Tensor, state: LayerState, position: Tensor) -> Tensor:  # type: ignore[override]
        """One token, (batch, D); ``position`` (batch,) tokens were read before."""
        z0, x0, z, xBC, dt = self._split(u)
        xBC = causal_conv1d_step(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, state=state["conv"], activation="silu"
        )
        x, B, C = self._parts(xBC)
        y = ssd_step(
            x, dt, -torch.exp(self.A_log.float()), B, C, self._skip(), dt_bias=self.dt_bias.float(), dt_softplus=True,
            dt_limit=self.dt_limit, state=state["ssm"],
        )  # fmt: skip
        attended = self.sparse(x.flatten(-2)[:, None], state=state, position=position)[:, 0]
        return self._finish(y.flatten(-2) + attended, z, z0, x0)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[..., None].to(x.dtype)


def _keep(state: LayerState, conv: Tensor | None, ssm: Tensor | None) -> None:
    assert conv is not None
    assert ssm is not None
    state["conv"].copy_(conv.detach())
    state["ssm"].copy_(ssm.detach())


class HaxBlock(Block):
    """The residual block, handing on what the attention branch takes besides its input."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        x = self._in(x)
        return x + self.mixer(normed(self.norm, x), state=state, position=position, lengths=lengths, **more)


class HaxLM(Rereading):
    """Embedding, blocks with sparse attention beside the scan, norm; the head is the embedding.

    Arguments: ``d_model``; ``n_layer``; ``vocab_size``; ``base`` "mamba" or "mamba2", its mixer's arguments in ``ssm``;
    ``sparse_arch`` (see :class:`zoo_language.hax_sparse.Pattern`; HAX is "sign_bin_lsh+key_selection"),
    ``sparse_keys``, ``num_hash``, ``data_max_length``; ``norm_eps``; ``residual_in_fp32``; ``causal`` and ``hash_seed``
    (see :class:`zoo_language.hax_sparse.SparseAttention`; a causal model's projections are fixed, seed 0 by default).

    With patterns that read the context the original is not causal: a later token changes earlier outputs. Such a model
    keeps the text as its state and reads it again for each token; a causal one goes on from keys, values and the scan's
    state. Raises ValueError for patterns and sizes that cannot be.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        base: str = "mamba",
        sparse_arch: str = "sign_bin_lsh+key_selection",
        sparse_keys: int = 64,
        num_hash: int = 8,
        data_max_length: int = 2048,
        ssm: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        causal: bool = False,
        hash_seed: int | None = None,
    ) -> None:
        super().__init__()
        mixers: dict[str, Any] = {"mamba": HaxMamba, "mamba2": HaxMamba2}
        if base not in mixers:
            raise ValueError(f"base is {base!r}; expected 'mamba' or 'mamba2'")
        self.vocab_size, self.causal = vocab_size, causal
        self.pattern = Pattern(sparse_arch, sparse_keys, num_hash, data_max_length)
        seed = 0 if causal and hash_seed is None else hash_seed
        own = dict(ssm or {}) | ({"norm_eps": norm_eps} if base == "mamba2" else {})
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            HaxBlock(
                RMSNorm(d_model, norm_eps),
                mixers[base](
                    d_model,
                    {"pattern": self.pattern, "causal": causal, "hash_seed": None if seed is None else seed + i},
                    **own,
                ),
                residual_in_fp32=residual_in_fp32,
            )
            for i in range(n_layer)
        )
        self.norm_f = RMSNorm(d_model, norm_eps)
        nn.init.normal_(self.embedding.weight, std=0.1)

    @property
    def streams(self) -> bool:
        """Whether a text can be read in pieces."""
        return self.causal or (not self.pattern.reads_context and self.pattern.never_empty)

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """What the logits do not depend on smoothly: the key scores learn from :meth:`training_loss`."""
        if "key_selection" not in self.pattern.sources:
            return ()
        return tuple(f"layers.{i}.mixer.sparse.dx_proj" for i in range(len(self.layers)))

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding)

    def read(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        hashes: Iterator[Tensor] | None = None,
        losses: list[Tensor] | None = None,
        noises: Iterator[Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last norm of whole texts, (batch, length, channels).

        attention_mask (batch, length): False at padding. hashes: projections (N, num_hash) instead of random ones, in
        the order of the layers. losses: receives each layer's loss of the key scores, drawn with ``noises``.
        """
        x = self.embed(input_ids)
        for layer in self.layers:
            noise = None if noises is None else next(noises)
            x = layer(x, mask=attention_mask, hashes=hashes, losses=losses, noise=noise, lengths=lengths)
        return normed(self.norm_f, x)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        state: State | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, length, vocabulary); arguments as in :meth:`CausalLM.forward` and :meth:`read`."""
        if attention_mask is None:
            return super().forward(input_ids, state=state, lengths=lengths)
        if state is not None:
            raise ValueError("attention_mask is for whole texts; with a state give lengths")
        return self.head(self.read(input_ids, attention_mask=attention_mask, lengths=lengths))

    def training_loss(
        self, input_ids: Tensor, asked: Tensor, *, attention_mask: Tensor | None = None, gate_weight: float = 0.1
    ) -> Tensor:
        """Cross-entropy of the tokens behind the positions that ``asked`` (batch, length) marks, plus ``gate_weight``
        times the summed loss of the key scores: the original's recipe for joint recall (:mod:`zoo_language.hax_task`).
        """
        hidden, more = self.learn(input_ids, attention_mask=attention_mask, gate_weight=gate_weight)
        chosen = asked[:, :-1].bool()
        return more + F.cross_entropy(self.head(hidden[:, :-1][chosen]).float(), input_ids[:, 1:][chosen])

    def learn(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, gate_weight: float = 0.1
    ) -> tuple[Tensor, Tensor]:
        """Hidden states, and ``gate_weight`` times the summed loss of the key scores (see :mod:`.training`)."""
        losses: list[Tensor] = []
        hidden = self.read(input_ids, attention_mask=attention_mask, losses=losses)
        return hidden, gate_weight * sum(losses, hidden.new_zeros((), dtype=torch.float32))

    # -- decoding --------------------------------------------------------------------------------------------------

    def init_state(self, batch: int = 1) -> State:
        return CausalLM.init_state(self, batch) if self.streams else super().init_state(batch)

    def backbone(self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        if self.streams:
            return CausalLM.backbone(self, input_ids, state=state, lengths=lengths)
        return super().backbone(input_ids, state=state, lengths=lengths)

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        return CausalLM.step(self, token, state) if self.streams else super().step(token, state)

    def read_rows(self, ids: Tensor, count: Tensor) -> Tensor:
        """Each text by itself: what stands behind its end would change its means."""
        hidden = ids.new_zeros((*ids.shape, self.embedding.embedding_dim), dtype=self.embedding.weight.dtype)
        for length in count.unique().tolist():
            rows = (count == length).nonzero()[:, 0]
            if length:
                hidden[rows, :length] = self.read(ids[rows, :length]).to(hidden.dtype)
        return hidden

    def no_weight_decay(self) -> set[str]:
        """Parameters of the scans, which Mamba's authors do not decay."""
        return {n for n, _ in self.named_parameters() if n.endswith(("A_log", ".D", "dt_bias"))}


# -- the original's format --------------------------------------------------------------------------------------------

#: Keys of the original's configurations that change no number of a forward pass from given weights; its Mamba-2 mixer
#: has its gated norm whatever ``rms_norm`` says.
_SILENT = {
    "fuse_cross_entropy", "fuse_norm", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
    "rescale_prenorm_residual", "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme",
    "time_step_floor", "use_cache", "tie_word_embeddings", "chunk_size", "model_type", "transformers_version",
    "architectures", "torch_dtype", "time_step_rank", "rms_norm",
}  # fmt: skip
_KNOWN = {
    "base_arch", "vocab_size", "hidden_size", "state_size", "num_hidden_layers", "expand", "conv_kernel",
    "intermediate_size", "layer_norm_epsilon", "use_bias", "use_conv_bias", "hidden_act", "residual_in_fp32",
    "num_heads", "head_dim", "n_groups", "time_step_limit", "sparse_arch", "sparse_keys", "num_hash",
    "data_max_length",
}  # fmt: skip


def arguments_of(config: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """HaxLM's arguments from an EnhancedMambaConfig or its Mamba-2 form. Raises ValueError for what is not built."""
    unknown = sorted(set(config) - _KNOWN - _SILENT)
    if unknown:
        raise ValueError(f"hax has no configuration key {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}")
    base = config.get("base_arch", base or config.get("model_type", "mamba"))
    hidden, expand = config["hidden_size"], config.get("expand", 2)
    inner = int(expand * hidden)
    if base == "mamba" and config.get("intermediate_size", inner) != inner:
        inner = config["intermediate_size"]  # this width counts there; the Mamba-2 mixer reads expand alone
        expand = (inner + 0.5) / hidden  # rounded down to it again
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hax: hidden_act is {config['hidden_act']!r}; the original's configurations have 'silu'")
    ssm: dict[str, Any] = {
        "d_state": config.get("state_size", 16 if base == "mamba" else 128),
        "d_conv": config.get("conv_kernel", 4),
        "expand": expand,
        "bias": config.get("use_bias", False),
        "conv_bias": config.get("use_conv_bias", True),
    }
    limit = tuple(float(x) for x in config.get("time_step_limit") or (0.0, float("inf")))
    if base == "mamba2":
        ssm |= {"headdim": config.get("head_dim", 64), "ngroups": config.get("n_groups", 1), "dt_limit": limit}
        heads = config.get("num_heads", inner // ssm["headdim"])
        if heads * ssm["headdim"] != inner:
            raise ValueError(f"hax: {heads} heads of {ssm['headdim']} are not the mixer's {inner} channels")
    else:
        if limit != (0.0, float("inf")):
            raise ValueError(f"hax: time_step_limit is {limit}; Mamba's scan has none")
        ssm["dt_rank"] = config.get("time_step_rank", "auto")
    return {
        "d_model": hidden,
        "n_layer": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "base": base,
        "sparse_arch": config.get("sparse_arch", "none"),
        "sparse_keys": config.get("sparse_keys", 64),
        "num_hash": config.get("num_hash", 64),
        "data_max_length": config.get("data_max_length", 2048),
        "ssm": ssm,
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": config.get("residual_in_fp32", True),
    }


class HaxAdapter(ReferenceAdapter):
    """Reads DeepGraphLearning/HAX: EnhancedMambaModel, EnhancedMamba2Model (their LM heads are the embeddings), and the
    generator of joint recall."""

    system = "hax"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "n_value" in config:
            return JointRecallReplay(config)
        # Mamba-2's decay is one number a head, Mamba's a row of them.
        decay = next((v for k, v in state.items() if k.endswith("mixer.A_log")), None)
        base = None if decay is None else ("mamba" if decay.dim() == 2 else "mamba2")
        return self.load(HaxLM(**arguments_of(config, base)), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return arguments_of(config)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        mixer = "layers.{i:d}.mixer."
        return Rules(
            Rename("embeddings.weight", "embedding.weight"),
            Rename(mixer + "E", mixer + "sparse.gain"),
            Rename(mixer + "xx_proj.weight", mixer + "sparse.xx_proj.weight"),
            Rename(mixer + "dx_proj_{n:d}.{p}", mixer + "sparse.dx_proj_{n:d}.{p}"),
        )

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """``hash_proj.<i>`` are the projections in the order in which they are drawn, ``train_noise.<i>`` a layer's."""
        if isinstance(model, JointRecallReplay):
            return model(inputs)
        assert isinstance(model, HaxLM)
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None

        def numbered(name: str) -> Iterator[Tensor] | None:
            found = sorted((int(k.rpartition(".")[2]), v) for k, v in inputs.items() if k.startswith(name + "."))
            return iter([v for _, v in found]) if found else None

        found: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_hook(lambda _, __, out, i=i: found.__setitem__(f"mid/layer{i}", out))
            for i, layer in enumerate(model.layers)
        ]
        losses: list[Tensor] | None = [] if numbered("train_noise") is not None else None
        try:
            hidden = model.read(
                ids, attention_mask=mask, hashes=numbered("hash_proj"), losses=losses, noises=numbered("train_noise")
            )
        finally:
            for hook in hooks:
                hook.remove()
        found |= {"last_hidden_state": hidden, "logits": model.head(hidden)}
        if losses is not None:
            found["train_gate_loss"] = torch.stack(losses).sum()
        return found
