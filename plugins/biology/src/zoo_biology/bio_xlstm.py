"""The originals' formats: DNA-xLSTM, Prot-xLSTM, Chem-xLSTM (NX-AI/xlstm), and the two cells alone.

Stored norm weights are distances from 1 on both sides. The sLSTM's recurrent weights come in two layouts: published
checkpoints were trained with the CUDA one (heads, in, 4 out) with biases by (head, gate, channel); the plain one is
(heads, 4 out, in) with biases by (gate, head, channel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Permute, Rename, Reshape, Rules, Squeeze, Tied
from zoo_kernels import mlstm, mlstm_step, slstm

from . import configs
from .dna import DNAXLSTM, dna_xlstm
from .protein import ProtXLSTM
from .xlstm import XLSTMLM, SequenceModel

#: What stands before the keys of the published files.
PUBLISHED_PREFIX = {DNAXLSTM: "backbone.", ProtXLSTM: "backbone.", XLSTMLM: "model."}


class Adapter(ReferenceAdapter):
    """Reads ml-jku/DNA-xLSTM, ml-jku/Prot-xLSTM, ml-jku/Chem-xLSTM and NX-AI/xlstm's language models and cells."""

    system = "bio_xlstm"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "DQK" in config or "mlstm_kernels" in source:
            return MLSTMCell(config.get("chunk_size"))
        if "_recurrent_kernel_" in state:
            return self.load(SLSTMCell(config["hidden_size"], config["num_heads"]), state)
        model = _network(config, state, source)
        found = _prefix(state)
        model.reference_prefix = found if found is not None else PUBLISHED_PREFIX[_kind(model)]  # type: ignore[assignment]
        model.reference_cuda = _cuda_layout(state)  # type: ignore[assignment]
        return self.load(model, state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kind = _system(config, {}, "")
        return {"dna": configs.dna, "protein": configs.protein, "chemistry": configs.chemistry}[kind](config)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if isinstance(model, SLSTMCell) or "_recurrent_kernel_" in state:
            heads = next(v.shape[0] for k, v in state.items() if k.endswith(("_recurrent_kernel_", "recurrent")))
            return Rules(*_cell_rules("", "", heads, _cuda_layout(state)))
        prefix = _prefix(state)
        if prefix is None:  # ours
            default = PUBLISHED_PREFIX[_kind(model)] if isinstance(model, SequenceModel) else ""
            prefix = getattr(model, "reference_prefix", default)
            cuda, wrapped = getattr(model, "reference_cuda", True), bool(getattr(model, "rcps", False))
        else:
            cuda, wrapped = _cuda_layout(state), any(".submodule." in key for key in state)
        heads = next((v.shape[0] for k, v in state.items() if k.endswith(("_recurrent_kernel_", "mixer.recurrent"))), 0)
        slstm_blocks = {
            key.removeprefix(prefix).removeprefix("xlstm_block_stack.").split(".")[1]
            for key in state
            if key.endswith(("_recurrent_kernel_", "mixer.recurrent"))
        }
        return _rules(prefix, ".submodule" if wrapped else "", slstm_blocks, heads, cuda)

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: Any = None
    ) -> dict[str, Tensor]:
        if isinstance(model, MLSTMCell | SLSTMCell):
            return model.replay(inputs)
        tokens = inputs["tokens"] if "tokens" in inputs else inputs["input_ids"]
        names = {str(name).removeprefix("out/") for name in wanted or ()}
        found: dict[str, Tensor] = {}
        hooks = _record(model, found)
        try:
            if isinstance(model, DNAXLSTM):
                found["logits"] = model(tokens)
                found["hidden"] = model.hidden(tokens)
                if model.rcps:
                    assert model.complement is not None
                    found["logits_of_rc"] = model(model.complement[tokens.flip(1)])
                return found
            ids = _positions(model, inputs, tokens)
            found["logits"] = model(tokens, **ids)
        finally:
            for hook in hooks:
                hook.remove()
        assert isinstance(model, ProtXLSTM | XLSTMLM)
        if "logits_two_chunks" in names:
            found["logits_two_chunks"] = _two_chunks(model, tokens, ids, call)
        if names & {"step_logits", "state_C", "state_n", "state_m", "conv_state", "slstm_state"}:
            found |= _steps(model, tokens, ids)
        return found

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        if isinstance(model, MLSTMCell):  # it has no parameters: its files hold the inputs' gradients
            return {name: leaf.grad for name, leaf in model.leaves.items() if leaf.grad is not None}
        return super().gradients(model)


# -- which network ----------------------------------------------------------------------------------------------------


def _system(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> str:
    """One of dna, protein, chemistry: from the source where it is named, else from the arguments that only one has."""
    for name, kind in (("DNA-xLSTM", "dna"), ("Prot-xLSTM", "protein"), ("Chem-xLSTM", "chemistry")):
        if name in source and "NX-AI/xlstm@" not in source:
            return kind
    if "NX-AI/xlstm@" in source:
        return "chemistry"
    if configs.DNA_STACK & set(config) or "d_model" in config or "n_layer" in config:
        return "dna"
    layer = (config.get("mlstm_block") or {}).get("mlstm") or {}
    if configs.PROTEIN & set(config) or "return_last_state" in layer or "backend" in layer:
        return "protein"
    return "chemistry"


def _network(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> SequenceModel:
    kind = _system(config, state, source)
    if kind == "dna":
        return dna_xlstm(**configs.dna(config))
    if kind == "protein":
        return ProtXLSTM(**configs.protein(config))
    return XLSTMLM(**configs.chemistry(config))


def _kind(model: nn.Module) -> type:
    return next(kind for kind in PUBLISHED_PREFIX if isinstance(model, kind))


# -- keys -------------------------------------------------------------------------------------------------------------


def _prefix(state: Mapping[str, Tensor]) -> str | None:
    """What stands before the original's keys; None for a state dict in our format."""
    mark = "xlstm_block_stack."
    return next((key[: key.index(mark)] for key in state if mark in key), None)


def _cuda_layout(state: Mapping[str, Tensor]) -> bool:
    """Whether recurrent weights lie as (heads, in, 4 out)."""
    kernel = next((v for k, v in state.items() if k.endswith("_recurrent_kernel_")), None)
    return kernel is None or kernel.shape[2] == 4 * kernel.shape[1]


def _cell_rules(theirs: str, ours: str, heads: int, cuda: bool) -> list[Rename]:
    def kernel(shape: torch.Size) -> tuple[int, ...]:
        width = min(shape[1:])
        return (heads, width, 4, width) if cuda else (heads, 4, width, width)

    def bias(shape: torch.Size) -> tuple[int, ...]:
        return (heads, 4, -1) if cuda else (4, heads, -1)

    def flat(shape: torch.Size) -> tuple[int, ...]:
        return (heads, shape[1], -1) if cuda else (heads, 4 * shape[2], -1)

    # plain: (heads, gate, out, in) there, (heads, in, gate, out) here
    turn = [] if cuda else [Permute((0, 3, 1, 2))]
    swap = [] if cuda else [Permute((1, 0, 2))]
    return [
        Rename(theirs + "_recurrent_kernel_", ours + "recurrent", Reshape(kernel, flat), *turn),
        Rename(theirs + "_bias_", ours + "bias", Reshape(bias, (-1,)), *swap),
    ]


def _rules(prefix: str, wrap: str, slstm_blocks: set[str], heads: int, cuda: bool) -> Rules:
    """``wrap``: what reverse-complement models put around every module (".submodule")."""
    stack = prefix + "xlstm_block_stack."
    rules: list[Any] = []
    if wrap:
        rules += [
            Tied(prefix + "token_embedding.complement_map", prefix + "lm_head.complement_map"),
            Rename(prefix + "token_embedding.complement_map", "complement"),
            Rename(prefix + "token_embedding.embedding.weight", "embedding.weight"),
            Rename(prefix + "lm_head.lm_head.weight", "head.weight"),
        ]
    rules += [
        Rename(prefix + "token_embedding.weight", "embedding.weight"),
        Rename(prefix + "lm_head.weight", "head.weight"),
        Rename(prefix + "position_embedding.weight", "position_embedding.weight"),
        Rename(prefix + "seq_position_embedding.weight", "sequence_embedding.weight"),
        Rename(stack + "absolute_pos_embeds.scale", "position_scale"),
        Rename(stack + f"post_blocks_norm{wrap}.weight", "norm.weight"),
    ]
    block, own = stack + "blocks.{i:d}.", "blocks.{i:d}."
    rules += [
        Rename(block + f"xlstm_norm{wrap}.weight", own + "norm.weight"),
        Rename(block + f"ffn_norm{wrap}.weight", own + "ffn_norm.weight"),
        Rename(block + f"ffn{wrap}.proj_up." + "{p}", own + "ffn.up.{p}"),
        Rename(block + f"ffn{wrap}.proj_down." + "{p}", own + "ffn.down.{p}"),
    ]
    for i in sorted(slstm_blocks):  # before the mLSTM's: both have an igate, and they are different things
        theirs, ours = f"{stack}blocks.{i}.xlstm{wrap}.", f"blocks.{i}.mixer."
        rules += [
            Rename(theirs + "fgate.weight", ours + "i_proj.weight"),
            Rename(theirs + "igate.weight", ours + "f_proj.weight"),
            Rename(theirs + "zgate.weight", ours + "z_proj.weight"),
            Rename(theirs + "ogate.weight", ours + "o_proj.weight"),
            Rename(theirs + "group_norm.weight", ours + "norm.weight"),
            *_cell_rules(theirs + "slstm_cell.", ours, heads, cuda),
        ]
    layer, mixer = block + f"xlstm{wrap}.", own + "mixer."
    rules += [
        Rename(layer + "conv1d.conv.weight", mixer + "conv.weight", Squeeze(1)),
        Rename(layer + "conv1d.conv.bias", mixer + "conv.bias"),
        Rename(layer + "proj_up.{p}", mixer + "up.{p}"),
        Rename(layer + "proj_down.{p}", mixer + "down.{p}"),
        Rename(layer + "learnable_skip", mixer + "skip"),
        Rename(layer + "mlstm_cell.outnorm.weight", mixer + "norm.weight"),
    ]
    rules += [Rename(f"{layer}mlstm_cell.{gate}." + "{p}", f"{mixer}{gate}." + "{p}") for gate in ("igate", "fgate")]
    rules += [Rename(f"{layer}{name}." + "{p}", f"{mixer}{name}." + "{p}") for name in ("q_proj", "k_proj", "v_proj")]
    return Rules(*rules)


# -- replaying --------------------------------------------------------------------------------------------------------


def _record(model: nn.Module, found: dict[str, Tensor]) -> list[Any]:
    """Hooks that keep what enters the first block and leaves every block."""
    hooks = []

    def keep(name: str):
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    def before(module: nn.Module, args: Any) -> None:
        if "mid/embed" not in found:
            assert isinstance(model, SequenceModel)
            found["mid/embed"] = model.wide(args[0]) if isinstance(model, DNAXLSTM) else args[0]

    if isinstance(model, SequenceModel):
        hooks.append(model.blocks[0].register_forward_pre_hook(before))
        for i, block in enumerate(model.blocks):
            hooks.append(block.register_forward_hook(keep(f"mid/block{i}")))
    return hooks


def _positions(model: nn.Module, inputs: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    if not isinstance(model, ProtXLSTM) or not model.reads_position_ids:
        return {}
    ids = {
        "position_ids": inputs.get(
            "position_ids", torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        )
    }
    if model.reads_sequence_ids:
        ids["sequence_ids"] = inputs["seq_position_ids"]
    return ids


def _two_chunks(model: ProtXLSTM | XLSTMLM, tokens: Tensor, ids: Mapping[str, Tensor], call: Any) -> Tensor:
    """The first part, then the rest from the state; where the parts meet changes nothing but "rot" positions."""
    state = model.init_state(tokens.shape[0])
    middle = tokens.shape[1] // 2
    parts = []
    for piece in (slice(None, middle), slice(middle, None)):
        own = {name: value[:, piece] for name, value in ids.items()}
        parts.append(model(tokens[:, piece], state=state, **own))
    return torch.cat(parts, dim=1)


def _steps(model: ProtXLSTM | XLSTMLM, tokens: Tensor, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Token by token, and the first block's state after the last one as the originals hold it (keys scaled)."""
    state = model.init_state(tokens.shape[0])
    rows = [
        model.step(tokens[:, t], state, **{name: value[:, t] for name, value in ids.items()})
        for t in range(tokens.shape[1])
    ]
    found = {"step_logits": torch.stack(rows, dim=1)}
    first = state.layers[0]
    if "C" in first:
        scale = first["C"].shape[-1] ** -0.5
        found["state_C"] = first["C"].transpose(2, 3) * scale
        found["state_n"] = first["n"][..., None] * scale
        found["state_m"] = first["m"][..., None, None]
    else:
        found["slstm_state"] = first["cell"].transpose(0, 1).flatten(2)
    if "conv" in first:
        found["conv_state"] = first["conv"]
    return found


class MLSTMCell(nn.Module):
    """The mLSTM cell alone, as NX-AI/mlstm_kernels has it: (batch, heads, length, width) and gates (batch, heads,
    length), the query scaled."""

    def __init__(self, chunk_size: int | None = None) -> None:
        super().__init__()
        self.chunk_size = chunk_size  # of their speed alone: passing the state is exact

    def forward(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = [t.transpose(1, 2) for t in (q, k, v, i, f)]
        h, state = mlstm(*rows, return_final_state=True)
        assert state is not None
        return h.transpose(1, 2), state

    def replay(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.leaves = {name: inputs[name].detach().requires_grad_(torch.is_grad_enabled()) for name in "qkvif"}
        h, (C, n, m) = self(*self.leaves.values())
        found = {"h_parallel": h, "h_chunkwise": h, "C": C.transpose(2, 3), "n": n, "m": m[..., None]}
        state = tuple(torch.zeros_like(t) for t in (C, n, m))
        rows = []
        for t in range(h.shape[2]):
            row = (inputs[name][:, :, t].detach() for name in "qkvif")
            rows.append(mlstm_step(*row, state=state))  # type: ignore[arg-type, misc]
        C, n, m = state
        more = {"C_recurrent": C.transpose(2, 3), "n_recurrent": n, "m_recurrent": m[..., None]}
        return found | {"h_recurrent": torch.stack(rows, dim=2)} | more


class SLSTMCell(nn.Module):
    """The sLSTM cell alone: gates (batch, length, 4 * width) in the order i, f, z, o."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.recurrent = nn.Parameter(torch.zeros(heads, width // heads, 4, width // heads))
        self.bias = nn.Parameter(torch.zeros(heads, 4, width // heads))

    def forward(self, gates: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (batch, heads, length, headdim) and the state (4, batch, width): y, c, n, m."""
        rows = gates.unflatten(-1, (4, self.heads, -1))
        start = None if state is None else state.unflatten(-1, (self.heads, -1)).contiguous()
        y, last = slstm(rows, self.recurrent, self.bias, initial_state=start, return_final_state=True)
        assert last is not None
        return y.transpose(1, 2), last.flatten(2)

    def replay(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        found["y"], found["final_state"] = self(inputs["gates"])
        if "initial_state" in inputs:
            found["y_with_state"], found["final_state_with_state"] = self(inputs["gates"], inputs["initial_state"])
        heads, width = self.recurrent.shape[:2]
        return found | {
            "mid/recurrent_kernel_ext": self.recurrent,
            "mid/recurrent_kernel_cuda_layout": self.recurrent.reshape(heads, width, -1),
            "mid/bias_ext": self.bias,
            "mid/bias_cuda_layout": self.bias.reshape(-1),
        }
