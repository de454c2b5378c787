"""What replays STree's original: its tree scan, its tree convolution, both verifications, a Mamba-2 layer on a tree.

Paper: arXiv 2505.14969; original: wyc1997/stree @ 021b0ec (no licence stated). The parts themselves are
:mod:`zoo_language.tree_verification`, :mod:`zoo_language.tree_pass` and :func:`zoo_kernels.ops.ssd.ssd_tree`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Mamba2
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules
from zoo_kernels.ops.ssd import ancestor_windows, causal_conv1d_tree, ssd_tree

from .mamba_formats import decoding_as_published
from .tree_pass import mamba2_replay, mamba2_tree
from .tree_verification import Tree, match_greedy, speculative_sampling

#: Of the layer's configuration: speed and initialisation only.
_SILENT = {
    "chunk_size", "layer_idx", "use_mem_eff_path", "process_group", "sequence_parallel", "conv_init", "A_init_range",
    "dt_min", "dt_max", "dt_init_floor",
}  # fmt: skip


class TreeReplay(nn.Module):
    """A Mamba-2 layer and the operators, as the golden files call them. ``D_has_hdim`` is that of the bare scan."""

    def __init__(self, layer: Mapping[str, Any], op: Mapping[str, Any]) -> None:
        super().__init__()
        known = {
            "d_model", "d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups", "rmsnorm", "norm_before_gate",
            "D_has_hdim", "dt_limit", "bias", "conv_bias",
        }  # fmt: skip
        unknown = sorted(set(layer) - known - _SILENT)
        if unknown:
            raise ValueError(
                f"stree: the layer has no argument {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        self.layer = Mamba2(**{k: v for k, v in layer.items() if k not in _SILENT}) if layer else None
        self.op = dict(op)

    def scan(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``op.*``: the scan, its decays, its gated form and the state of every node."""
        t = {k.removeprefix("op."): v for k, v in inputs.items() if k.startswith("op.")}
        softplus = self.op.get("dt_softplus", True)
        limit = tuple(float(v) for v in self.op.get("dt_limit") or (0.0, float("inf")))
        dt = t["dt"] + t["dt_bias"] if "dt_bias" in t else t["dt"]
        d = (F.softplus(dt) if softplus else dt).clamp(*limit)
        total = torch.einsum("bij,bjh->bhi", t["mask"].to(d.dtype), d * t["A"])
        y, states = ssd_tree(
            t["x"], t["dt"], t["A"], t["B"], t["C"], t.get("D"), None, t.get("dt_bias"), mask=t["mask"].bool(),
            dt_softplus=softplus, dt_limit=(limit[0], limit[1]), initial_state=t.get("initial_states"),
            return_node_states=True,
        )  # fmt: skip
        assert states is not None
        found = {"mid/op.dA_tree_cumsum": total, "mid/op.dt_softplus": d.transpose(1, 2), "op.node_states": states}
        if "z" in t:
            found["op.out_before_gate"] = y
            y = y * F.silu(t["z"])
        return found | {"op.y": y}

    def conv(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``conv.*``, channels first as the original has them."""
        t = {k.removeprefix("conv."): v for k, v in inputs.items() if k.startswith("conv.")}
        y = causal_conv1d_tree(
            t["x"].transpose(1, 2), t["weight"], t.get("bias"), mask=t["mask"].bool(),
            state=t["state"].transpose(1, 2), activation="silu",
        )  # fmt: skip
        return {"conv.y": y.transpose(1, 2), "conv.ancestor_index": ancestor_windows(t["mask"], t["weight"].shape[1])}

    def verify(self, inputs: Mapping[str, Tensor], how: str = "") -> dict[str, Tensor]:
        """``verify.*``: the most likely token is matched; ``mss.*``: multi-step speculative sampling, the last token
        being the most likely one of what it would be drawn from. ``how``: the call of the latter, for its filters."""
        sequence, logits = inputs["verify.sequence"], inputs["verify.logits"][0]
        mask = inputs["verify.mask"][0]
        tree = Tree.from_mask(inputs["verify.tokens"][0].tolist(), mask)
        answers = {"verify": match_greedy(tree, logits)}
        found = {}
        if "mss.draft_logits" in inputs:
            target, draft = (filtered(t, how) for t in (logits, inputs["mss.draft_logits"][0]))
            answers["mss"], last = speculative_sampling(
                tree, target, draft, iter(inputs["mss.uniforms"].tolist()),
                lambda p: int(p.argmax()), max_depth=max(tree.depths()),
            )  # fmt: skip
            found["mss.final_distribution"] = last[None]
        for name, accepted in answers.items():
            new = torch.tensor([accepted.tokens], dtype=sequence.dtype, device=sequence.device)
            found |= {
                f"{name}.sequence": torch.cat([sequence, new], dim=1),
                f"{name}.num_new": torch.tensor(len(accepted.tokens)),
                f"{name}.path_mask": accepted.mask(len(tree.tokens))[None].to(mask.dtype),
            }
        return found

    def steps(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``layer.*``: a tree, its accepted path, the next tree."""
        assert self.layer is not None
        t = {k.removeprefix("layer."): v for k, v in inputs.items() if k.startswith("layer.")}
        state = {"conv": t["conv_state"].transpose(1, 2).clone(), "ssm": t["ssm_state"].clone()}
        y1, kept = mamba2_tree(self.layer, t["u1"], state, t["mask1"].bool())
        with decoding_as_published(self.layer):
            mamba2_replay(self.layer, kept, state, t["verified_mask"].bool())
        y2, _ = mamba2_tree(self.layer, t["u2"], state, t["mask2"].bool())
        return {
            "layer.y1": y1,
            "layer.y2": y2,
            "layer.conv_state_after_verify": state["conv"].transpose(1, 2),
            "layer.ssm_state_after_verify": state["ssm"],
        }

    def forward(self, inputs: Mapping[str, Tensor], call: Any = None) -> dict[str, Tensor]:
        """Whatever the inputs are for; ``call``: the golden file's words on each."""
        parts = {"op.": self.scan, "conv.": self.conv, "layer.": self.steps}
        found: dict[str, Tensor] = {}
        for prefix, run in parts.items():
            if any(k.startswith(prefix) for k in inputs):
                found |= run(inputs)
        if "verify.tokens" in inputs:
            found |= self.verify(inputs, str(call.get("mss", "")) if isinstance(call, Mapping) else "")
        return found


def filtered(logits: Tensor, call: str) -> Tensor:
    """Logits as the original filters them before sampling: ``call`` names ``top_k``, ``temperature`` and ``top_p``.

    top_k 1 keeps the most likely token alone; above, the k most likely, then top-p; 0 divides by the temperature, then
    top-p: tokens of the lowest 1 - top_p are left out. Raises ValueError for what the original cannot do.
    """
    how = {k: float(v) for k, v in re.findall(r"\b(top_k|temperature|top_p|min_p)\s*=\s*([\d.]+)", call)}
    top_k, temperature, top_p = int(how.get("top_k", 0)), how.get("temperature", 1.0), how.get("top_p", 0.0)
    if how.get("min_p") or (top_k > 1 and temperature != 1):
        raise ValueError(f"stree: the original cannot filter trees as {call!r}: min_p, or top_k with a temperature")
    if top_k == 1:
        return torch.where(logits == logits.amax(-1, keepdim=True), 1.0, -torch.inf)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[..., -1:], -torch.inf)
    else:
        logits = logits / temperature
    if 0 < top_p < 1:
        ordered, order = logits.sort()
        out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, ordered.softmax(-1).cumsum(-1) <= 1 - top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


class STreeAdapter(ReferenceAdapter):
    """Reads wyc1997/stree: a Mamba-2 layer's weights; the operators have none."""

    system = "stree"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(TreeReplay(config.get("layer") or {}, config.get("op") or {}), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules(Rename("{rest:*}", "layer.{rest:*}"))

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        return model(inputs, call)
