"""DYNAMAX: tokens leave a language model early, at a classifier that is sure of the next one.

Paper: Nogales, Gambella, Roveri, "DYNAMAX: Dynamic computing for Transformers and Mamba based architectures", arXiv
2504.20922. No code or weights are public. The paper's are the kinds of classifier, their places in the latter half, the
distillation from the whole model with a top-k relaxation and linearly falling weights, and what skipped blocks do with
their caches; sizes, the confidence (the largest probability) and the form of the loss are our reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear, Mamba, Mamba2, RMSNorm
from zoo_kernels import causal_conv1d_step, selective_scan_step, ssd_step

from ._base import Block, CausalLM, normed
from .attention import MultiHeadAttention
from .mamba import MambaLM
from .state import LayerState, State

KINDS = ("calm", "ffn", "mamba")


class Exit(nn.Module):
    """A classifier of the next token on the hidden states behind a block.

    kind "calm": a linear layer (``norm``: behind an RMS norm); "ffn": norm, gated SiLU MLP of width ``d_ff``, linear
    layer; "mamba": norm, then a Mamba or Mamba-2 mixer (``layer``, its arguments in ``ssm``) whose output projection
    gives the logits. Only the last has a state.
    """

    def __init__(
        self, kind: str, d_model: int, vocab: int, *, norm: bool, d_ff: int, layer: str, ssm: Mapping[str, Any]
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"exit_kind is {kind!r}; expected one of {', '.join(KINDS)}")
        self.norm = RMSNorm(d_model) if norm or kind != "calm" else None
        self.gate = Linear(d_model, d_ff, bias=False) if kind == "ffn" else None
        self.up = Linear(d_model, d_ff, bias=False) if kind == "ffn" else None
        self.down = Linear(d_ff, d_model, bias=False) if kind == "ffn" else None
        self.mixer: Mamba | Mamba2 | None = None
        if kind == "mamba":
            mixers: dict[str, Any] = {"Mamba1": Mamba, "Mamba2": Mamba2}
            if layer not in mixers:
                raise ValueError(f"exit_layer is {layer!r}; expected 'Mamba1' or 'Mamba2'")
            mixer = mixers[layer](d_model, **ssm)
            mixer.out_proj = Linear(mixer.d_inner, vocab, bias=False)
            self.mixer = mixer
        self.head = None if kind == "mamba" else Linear(d_model, vocab, bias=False)

    def init_state(self, batch: int) -> LayerState:
        return {} if self.mixer is None else self.mixer.init_state(batch)

    def _classify(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            assert self.up is not None
            assert self.down is not None
            x = self.down(F.silu(self.gate(x)) * self.up(x))
        assert self.head is not None
        return self.head(x)

    def forward(self, x: Tensor, *, state: LayerState | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocabulary) of x (batch, length, d_model)."""
        x = x if self.norm is None else normed(self.norm, x)
        return self._classify(x) if self.mixer is None else self.mixer(x, state=state, lengths=lengths)

    def step(self, x: Tensor, state: LayerState) -> Tensor:
        """Logits (batch, vocabulary) of x (batch, d_model)."""
        x = x if self.norm is None else normed(self.norm, x)
        return self._classify(x) if self.mixer is None else self.mixer.step(x, state)


def update_only(mixer: Mamba | Mamba2, u: Tensor, state: LayerState) -> None:
    """Move a scan's state over one token u (batch, d_model) without its gate and output projection."""
    weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    A = -torch.exp(mixer.A_log.float())
    if isinstance(mixer, Mamba):
        x, _ = mixer.in_proj(u).chunk(2, dim=-1)
        x = causal_conv1d_step(x, weight, bias, state=state["conv"], activation="silu")
        dt, B, C = mixer.x_proj(x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        selective_scan_step(
            x, dt @ mixer.dt_proj.weight.t(), A, B, C, mixer.D.float(), None, mixer.dt_proj.bias.float(),
            state=state["ssm"], dt_softplus=True,
        )  # fmt: skip
        return
    _, _, _, xBC, dt = mixer._split(u)
    activation = "silu" if mixer.conv_activation == "silu" else None
    xBC = causal_conv1d_step(xBC, weight, bias, state=state["conv"], activation=activation)
    x, B, C = mixer._parts(mixer._act(xBC))
    ssd_step(
        x, dt, A, B, C, mixer._skip(), dt_bias=mixer.dt_bias.float(), dt_softplus=True, dt_limit=mixer.dt_limit,
        state=state["ssm"],
    )  # fmt: skip


class DynamaxLM(CausalLM):
    """A language model of Mamba, Mamba-2 or attention blocks with early exits.

    Arguments: ``backbone``, those of :class:`~zoo_language.mamba.MambaLM`; ``exits``, the blocks (counted from 1)
    behind which a classifier stands, by default n/2, n/2 + ``stride`` ... in the latter half; ``exit_kind`` with
    ``exit_norm``, ``exit_d_ff``, ``exit_layer``, ``exit_ssm`` (see :class:`Exit`).

    Decoding: ``threshold``, one number or one an exit, sets how sure a classifier must be (its largest probability, or
    with ``confidence`` "entropy" 1 minus the entropy over its maximum); above 1, the default, nothing leaves early.
    Each text's token leaves by itself. ``policy``: what the scans of skipped blocks do, "partial" (their states move on
    from the hidden state at the exit) or "skip" (they stay). Skipped attention copies the keys and values of the last
    attention that ran. Prefill runs whole. The last entry of a state's ``layers`` says where the last token left
    (``block``), how sure that was, and how many blocks ran for how many tokens.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        exits: Sequence[int] | None = None,
        stride: int = 4,
        exit_kind: str = "calm",
        exit_norm: bool = False,
        exit_d_ff: int | None = None,
        exit_layer: str = "Mamba1",
        exit_ssm: Mapping[str, Any] | None = None,
        threshold: float | Sequence[float] = 2.0,
        confidence: str = "max",
        policy: str = "partial",
        _model: MambaLM | None = None,
    ) -> None:
        super().__init__()
        if policy not in ("partial", "skip"):
            raise ValueError(f"policy is {policy!r}; expected 'partial' or 'skip'")
        if confidence not in ("max", "entropy"):
            raise ValueError(f"confidence is {confidence!r}; expected 'max' or 'entropy'")
        self.model = MambaLM(**backbone) if _model is None else _model
        count, width = len(self.model.layers), self.model.d_model
        places = list(range(count // 2, count, stride)) if exits is None else sorted(exits)
        if not places or not 1 <= places[0] <= places[-1] <= count:
            raise ValueError(f"exits are {places}; expected some of the blocks 1 to {count}")
        vocab = self.model.embedding.num_embeddings
        self.exits = nn.ModuleDict(
            {
                str(place): Exit(
                    exit_kind, width, vocab, norm=exit_norm, d_ff=exit_d_ff or 4 * width, layer=exit_layer,
                    ssm=exit_ssm or {},
                )
                for place in places
            }
        )  # fmt: skip
        self.vocab_size = self.model.vocab_size
        self.threshold, self.confidence, self.policy = threshold, confidence, policy
        #: the logits come from the backbone; the classifiers learn from :meth:`exit_loss`
        self.unused_parameters = ("exits.",)

    @classmethod
    def around(cls, model: MambaLM, **arguments: Any) -> DynamaxLM:
        """Exits on a model that exists (and stays the same object); arguments as above."""
        return cls({}, **arguments, _model=model)

    # -- the whole model -------------------------------------------------------------------------------------------

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        return self.model.layers

    @property
    def norm_f(self) -> nn.Module:  # type: ignore[override]
        return self.model.norm_f

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.embed(input_ids)

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)

    def init_state(self, batch: int = 1) -> State:
        inner = self.model.init_state(batch)
        device = inner.position.device
        counts = {name: torch.zeros(batch, dtype=torch.long, device=device) for name in ("block", "ran", "tokens")}
        told = {**counts, "confidence": torch.zeros(batch, device=device)}
        parts = [*inner.layers, *(e.init_state(batch) for e in self.exits.values()), told]  # type: ignore[operator]
        return State(parts, inner.position, None, self.state_name)

    def backbone(self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        self._check(input_ids, state, lengths)
        return self._run(input_ids, state, lengths)[0]

    def _run(
        self, input_ids: Tensor, state: State | None, lengths: Tensor | None, logits: bool = False
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states, and the exits' logits (if asked for, or where a state needs them to move on)."""
        x = self.embed(input_ids)
        found: dict[int, Tensor] = {}
        position = None if state is None else state.position
        for i, layer in enumerate(self.layers):
            own = None if state is None else state.layers[i]
            x = layer(x, state=own, position=position, lengths=lengths)
            exit_ = self._exit(i + 1)
            if exit_ is not None and (logits or (state is not None and exit_.mixer is not None)):
                kept = None if state is None else state.layers[self._place(i + 1)]
                found[i + 1] = exit_(x.detach(), state=kept, lengths=lengths)
        if state is not None:
            state.position += input_ids.shape[1] if lengths is None else lengths
        return normed(self.norm_f, x), found

    def _exit(self, block: int) -> Exit | None:
        name = str(block)
        if name not in self.exits:
            return None
        return self.exits[name]  # type: ignore[return-value]

    def _place(self, block: int) -> int:
        """Where an exit's state lies."""
        return len(self.layers) + list(self.exits).index(str(block))

    def exit_logits(self, input_ids: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The whole model's logits, and each exit's by its block: (batch, length, vocabulary) each."""
        hidden, found = self._run(input_ids, None, None, logits=True)
        return self.head(hidden), found

    def exit_loss(self, input_ids: Tensor, *, top_k: int = 5, form: str = "kl") -> Tensor:
        """What the exits learn from: the whole model's answers, summed over exits with weights 1, 1 - 1/E ... 1/E.

        form "kl": the divergence from the oracle's ``top_k`` probabilities, renormalised; "relaxed": cross-entropy with
        the oracle's most likely token, or with the exit's own where that is among the oracle's ``top_k``. Only the
        exits receive gradients.
        """
        if form not in ("kl", "relaxed"):
            raise ValueError(f"form is {form!r}; expected 'kl' or 'relaxed'")
        with torch.no_grad():
            hidden = self._run(input_ids, None, None)[0]
            oracle = self.head(hidden).float()
            likely, ids = oracle.topk(min(top_k, oracle.shape[-1]), dim=-1)
            likely = likely.log_softmax(-1)
        x = self.embed(input_ids).detach()
        total = oracle.new_zeros(())
        count, done = len(self.exits), 0
        for i, layer in enumerate(self.layers):
            with torch.no_grad():
                x = layer(x)
            exit_ = self._exit(i + 1)
            if exit_ is None:
                continue
            log_p = exit_(x).float().log_softmax(-1)
            if form == "kl":
                loss = (likely.exp() * (likely - log_p.gather(-1, ids))).sum(-1).mean()
            else:
                own = log_p.argmax(-1, keepdim=True)
                target = torch.where((own == ids).any(-1, keepdim=True), own, ids[..., :1])
                loss = -log_p.gather(-1, target).mean()
            total = total + (1 - done / count) * loss
            done += 1
        return total

    def learn(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states, and :meth:`exit_loss`: the exits learn beside the model (see :mod:`.training`)."""
        return self.backbone(input_ids), self.exit_loss(input_ids)

    # -- decoding --------------------------------------------------------------------------------------------------

    def sure(self, logits: Tensor) -> Tensor:
        """The confidence in logits (rows, vocabulary), (rows,) float32."""
        p = logits[:, : self.vocab_size].float().softmax(-1)
        if self.confidence == "max":
            return p.max(-1).values
        entropy = -torch.special.xlogy(p, p).sum(-1)
        return 1 - entropy / torch.log(torch.tensor(float(self.vocab_size)))

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        """Read one token of each text; the logits are those of the exit that each leaves at, or the model's own."""
        levels = self.threshold if isinstance(self.threshold, Sequence) else [self.threshold] * len(self.exits)
        if len(levels) != len(self.exits):
            raise ValueError(f"threshold has {len(levels)} values for {len(self.exits)} exits")
        early = min(levels) <= 1
        told = state.layers[-1]
        rows = torch.arange(len(token), device=token.device)  # texts that are still in
        x = self.embed(token[:, None])[:, 0]
        logits = torch.zeros(len(token), self.model.embedding.num_embeddings, device=x.device)
        told["block"].fill_(len(self.layers))
        told["confidence"].fill_(1.0)
        last: tuple[int, ...] = ()  # attention blocks that ran so far
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            with _Rows(state.layers[i], rows, len(token)) as own:
                x = layer.step(x, own, state.position[rows])
            if isinstance(layer.mixer, MultiHeadAttention):
                last = (*last, i)
            exit_ = self._exit(i + 1)
            if exit_ is None or not (early or exit_.mixer is not None):
                continue
            with _Rows(state.layers[self._place(i + 1)], rows, len(token)) as own:
                answer = exit_.step(x, own)
            sure = self.sure(answer)
            leaves = sure >= levels[list(self.exits).index(str(i + 1))]
            if bool(leaves.any()):
                gone = rows[leaves]
                logits[gone] = answer[leaves].float()
                told["block"][gone], told["confidence"][gone] = i + 1, sure[leaves]
                self._skip(i + 1, x[leaves], gone, state, last)
                rows, x = rows[~leaves], x[~leaves]
                if not len(rows):
                    break
        if len(rows):
            logits[rows] = self.head(normed(self.norm_f, x)).float()
        told["ran"] += told["block"]
        told["tokens"] += 1
        state.position += 1
        state.logits = logits
        return logits

    def _skip(self, block: int, x: Tensor, rows: Tensor, state: State, attended: tuple[int, ...]) -> None:
        """The blocks behind ``block`` for texts ``rows`` that left there with hidden states x (rows, d_model)."""
        total = state.batch
        for i in range(block, len(self.layers)):
            layer = self.layers[i]
            assert isinstance(layer, Block)
            if isinstance(layer.mixer, MultiHeadAttention):
                with _Rows(state.layers[i], rows, total) as own:
                    if not attended:  # nothing to copy: its own projections of the hidden state here
                        layer.mixer.step(normed(layer.norm, layer._in(x)), own, state.position[rows])
                        continue
                    source = state.layers[attended[-1]]
                    at = state.position[rows]
                    k, v = (source[n][rows, at][:, None] for n in ("k", "v"))
                    layer.mixer.cache.write(own, k, v, at, None)
                    if "conv" in own and "conv" in source:
                        own["conv"].copy_(torch.cat([own["conv"][:, 1:], source["conv"][rows, -1:]], dim=1))
            elif self.policy == "partial":
                with _Rows(state.layers[i], rows, total) as own:
                    update_only(layer.mixer, normed(layer.norm, layer._in(x)), own)  # type: ignore[arg-type]


class _Rows:
    """Some rows of a layer's state, written back when they are done with; all rows are the state itself."""

    def __init__(self, state: LayerState, rows: Tensor, total: int) -> None:
        self.state, self.rows, self.whole = state, rows, len(rows) == total

    def __enter__(self) -> LayerState:
        self.own = self.state if self.whole else {k: v[self.rows] for k, v in self.state.items()}
        return self.own

    def __exit__(self, *_: object) -> None:
        if self.whole:
            return
        for name, value in self.own.items():
            old = self.state[name]
            if old.dim() > 1 and value.shape[1] > old.shape[1]:  # a cache that grew
                old = self.state[name] = F.pad(old, (0, 0) * (old.dim() - 2) + (0, value.shape[1] - old.shape[1]))
            elif old.dim() > 1 and value.shape[1] < old.shape[1]:
                value = F.pad(value, (0, 0) * (old.dim() - 2) + (0, old.shape[1] - value.shape[1]))
            old[self.rows] = value


def saved(state: State, blocks: int) -> Tensor:
    """The share of blocks that decoding left out, (batch,), from a state of a model of ``blocks`` blocks."""
    told = state.layers[-1]
    return 1 - told["ran"].double() / (told["tokens"].clamp(min=1) * blocks)
