"""Decoding one text on a CPU: the weights packed once, one native call a token (:class:`zoo_kernels.MambaStep`).

:func:`zoo_language.generation.generate` uses it by itself where it applies; :meth:`CausalLM.fast_decoder` makes one
with weights in bfloat16 or int8, which halves or quarters the bytes that a step reads.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from zoo.layers import Mamba, Mamba2, RMSNorm
from zoo_kernels import runtime
from zoo_kernels.ops.mamba_step import MambaBlock, MambaStep, Matrix, unavailable

from ._base import Block, CausalLM
from .mamba import MambaLM
from .state import State

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


class Decoder:
    """Reads one token at a time for one text: ``decoder.step(token, state)``, in place of ``model.step``.

    weights: how the matrices are stored, "float32", "bfloat16", "float16" or "int8" (symmetric, a factor a row); None:
    as the model has them, without a copy. Activations, norms, recurrences and states stay in float32. The model's later
    changes are not seen. Raises ValueError, with the reason, for models that it does not serve.
    """

    def __init__(self, model: CausalLM, weights: str | None = None) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"no fused decoding for this model: {reason}")
        if weights is not None and weights not in WEIGHTS:
            raise ValueError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}, or None")
        assert isinstance(model, MambaLM)
        self.state_name, self.vocab_size = model.state_name, model.vocab_size
        dtype = model.embedding.weight.dtype if weights is None else WEIGHTS[weights]
        self.weights = str(dtype).removeprefix("torch.")
        embedding = model.embedding.weight.detach().contiguous()
        out = embedding if model.lm_head is None else model.lm_head.weight
        norm = model.norm_f
        assert isinstance(norm, RMSNorm)
        with torch.no_grad():
            blocks = [_block(layer, dtype) for layer in model.layers]
            self.stack = MambaStep(blocks, embedding, _small(norm.weight), norm.eps, Matrix.pack(out, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a step reads."""
        seen = {t.data_ptr(): t.numel() * t.element_size() for name, t in self.stack._tensors() if name != "embedding"}
        return sum(seen.values())

    @torch.no_grad()
    def step(self, token: Tensor | int, state: State) -> Tensor:
        """Read one token of one text; returns the next token's logits (1, padded vocabulary), as ``model.step``."""
        state.check(self.state_name)
        if state.batch != 1:
            raise ValueError(f"the state holds {state.batch} texts; the decoder reads one (use model.step)")
        parts = [(own["conv"][0], own["ssm"][0]) for own in state.layers]
        state.logits = self.stack(int(token), parts)[None]
        state.position += 1
        return state.logits


def why_not(model: CausalLM) -> str | None:
    """Why :class:`Decoder` does not serve a model, or None."""
    if not isinstance(model, MambaLM):
        return f"{type(model).__name__} is not a stack of Mamba or Mamba-2 blocks"
    kinds = {p.device.type for p in model.parameters()}
    if kinds != {"cpu"}:
        return f"it is on {', '.join(sorted(kinds))}; fused decoding runs on a CPU"
    if not {p.dtype for p in model.parameters()} <= {torch.float32, torch.bfloat16, torch.float16}:
        return "its parameters are not float32, bfloat16 or float16"
    if not isinstance(model.norm_f, RMSNorm):
        return "its norms are no RMS norms"
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        mixer = layer.mixer
        if layer.mlp is not None:
            return f"block {i} has an MLP"
        if type(mixer) not in (Mamba, Mamba2):
            return f"the mixer of block {i} is {type(mixer).__name__}"
        if isinstance(mixer, Mamba2) and (mixer.d_mlp or mixer.conv_activation != "silu"):
            return f"block {i} has a Mamba-2 mixer with an MLP beside it or another activation than SiLU"
    return None


_decoders: weakref.WeakKeyDictionary[CausalLM, tuple[tuple, list[Tensor], Decoder]] = weakref.WeakKeyDictionary()


def decoder_for(model: CausalLM, *, watch: bool = True) -> Decoder | None:
    """The model's own decoder, weights as they are, made anew where they changed; None where none serves.

    Only for float32 models in eval mode: there it gives what ``model.step`` gives, to rounding. ``watch``: also compare
    the numbers of what the decoder has copies of, which shows what was written through ``.data``; without it (from one
    token to the next) that is not seen.
    """
    if model.training or any(p.dtype != torch.float32 for p in model.parameters()) or why_not(model) is not None:
        return None
    if unavailable() is not None:
        runtime.passed_over("mamba_step", "native", unavailable() or "")
        return None
    key = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
    found = _decoders.get(model)
    if found is not None and found[0] == key and watch:
        found = found if all(map(torch.equal, found[1], _copied(model))) else None
    if found is None or found[0] != key:
        found = _decoders[model] = (key, [tensor.clone() for tensor in _copied(model)], Decoder(model))
    return found[2] if found[2].stack.backend == "native" else None


def _copied(model: CausalLM) -> list[Tensor]:
    """The parameters that a decoder of a float32 model holds in another form."""
    mixers = [layer.mixer for layer in model.layers]
    return [t.detach() for mixer in mixers for t in (mixer.A_log, mixer.conv1d.weight, mixer.D)]  # type: ignore[union-attr, operator]


def _small(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _block(block: Block, dtype: torch.dtype) -> MambaBlock:
    mixer, norm = block.mixer, block.norm
    assert isinstance(mixer, Mamba | Mamba2)
    assert isinstance(norm, RMSNorm)
    bias = mixer.conv1d.bias
    common = {
        "norm": _small(norm.weight),
        "norm_eps": norm.eps,
        "in_proj": Matrix.pack(mixer.in_proj.weight, dtype, mixer.in_proj.bias),
        "out_proj": Matrix.pack(mixer.out_proj.weight, dtype, mixer.out_proj.bias),
        "conv": mixer.conv1d.weight.detach().float().squeeze(1).t().contiguous(),
        "conv_bias": None if bias is None else _small(bias),
        "A": -torch.exp(_small(mixer.A_log)),
        "states": mixer.d_state,
    }
    if isinstance(mixer, Mamba):
        return MambaBlock(
            **common,
            skip=_small(mixer.D),
            x_proj=Matrix.pack(mixer.x_proj.weight, dtype),
            dt_proj=Matrix.pack(mixer.dt_proj.weight, dtype, mixer.dt_proj.bias),
        )
    gate = mixer.norm
    skip = _small(mixer.D)
    return MambaBlock(
        **common,
        skip=skip if mixer.D_has_hdim else skip.repeat_interleave(mixer.headdim),
        heads=mixer.nheads,
        groups=mixer.ngroups,
        dt_bias=_small(mixer.dt_bias),
        dt_limit=mixer.dt_limit,
        gate_norm=None if gate is None else _small(gate.weight),
        gate_eps=1e-5 if gate is None else gate.eps,
        norm_before_gate=gate is not None and gate.norm_before_gate,
    )
