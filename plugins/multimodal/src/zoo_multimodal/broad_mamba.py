"""Broad Mamba for emotion recognition in conversation: context by a bidirectional scan, fusion guided by probabilities.

Paper: Shou et al., "Revisiting Multi-modal Emotion Learning with Broad State Space Models and Probability-guidance
Fusion", arXiv 2404.17858 (ECML PKDD 2025). No code or weights are public: this is a reading of the paper, and nothing
can be compared with an original. The paper's are: a bidirectional state-space convolution and a broad learning system
for each modality, fusion weights from predicted label probabilities. Ours are the sizes, the norms and residuals, the
exact form of the confidence, speaker embeddings, and what happens to a modality that an utterance lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Linear, PathScan, Recomputed
from zoo_kernels import causal_conv1d

from .broad_learning import BroadLearning

MODALITIES = ("text", "audio", "visual")
CONFIDENCES = ("label", "predicted", "entropy")
DIRECTIONS = [False, True]  # forwards, backwards


class BidirectionalScan(Recomputed):
    """``x + W_out ((forwards(u) + backwards(u)) silu(gate))`` with ``u, gate = W_in LayerNorm(x)``.

    Each direction has a causal convolution, SiLU and a selective scan of its own. Backwards begins at a dialogue's own
    last utterance, wherever its row of the batch ends.
    """

    def __init__(self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner = expand * dim
        self.norm = nn.LayerNorm(dim)
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2, inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(2, inner))
        self.scan = PathScan(inner, d_state, math.ceil(dim / 16), paths=2)
        self.out_proj = Linear(inner, dim, bias=False)
        bound = d_conv**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, length, D) to the same; rows behind ``lengths`` (batch,) change nothing."""
        u, gate = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        walk: dict[str, Any] = {"reverse": DIRECTIONS, "lengths": lengths}
        u, _ = causal_conv1d(u, self.conv_weight, self.conv_bias, activation="silu", **walk)
        return x + self.out_proj(self.scan(u, z=gate, **walk))


class Context(nn.Module):
    """One modality: a linear map, ``layers`` of bidirectional scan and broad learning with residuals, a norm.

    ``missing``: what stands for an utterance that lacks the modality.
    """

    def __init__(self, dim_in: int, dim: int, layers: int, scan: Mapping[str, int], broad: Mapping[str, Any],
                 dropout: float) -> None:  # fmt: skip
        super().__init__()
        self.project = Linear(dim_in, dim)
        self.missing = nn.Parameter(torch.zeros(dim))
        self.scans = nn.ModuleList(BidirectionalScan(dim, **scan) for _ in range(layers))
        self.broads = nn.ModuleList(BroadLearning(dim, dim, **broad) for _ in range(layers))
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)
        nn.init.normal_(self.missing, std=0.02)

    def forward(self, x: Tensor, present: Tensor, speaker: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Features (batch, length, dim_in) and where they are known (batch, length, 1) to (batch, length, D)."""
        h = torch.where(present, self.project(torch.where(present, x, 0)), self.missing)
        h = h if speaker is None else h + speaker
        for scan, broad in zip(self.scans, self.broads, strict=True):
            h = scan(h, lengths)
            h = h + self.dropout(broad(h))
        return self.norm(h)


class BroadMamba(GradCheckpointing, nn.Module):
    """Emotion of every utterance of a dialogue, from features of its words, sound and picture.

    Arguments: ``classes``, the emotions' names; ``dims``, the number of features of each modality that the model reads
    (of "text", "audio", "visual"); ``dim`` D; ``layers``; ``speakers``, how many are told apart (0: none);
    ``confidence`` of a modality: "predicted", the probability of the class it predicts; "label", the same but that of
    the true class in training; "entropy", one minus the normalised entropy; ``fusion``: "sum" or "concat" of the
    weighted modalities; ``head``: "linear" or "broad" (a broad learning system, which :meth:`solve_head` can solve);
    ``scan`` and ``broad``, arguments of the parts; ``dropout``.
    """

    def __init__(
        self,
        classes: Sequence[str],
        dims: Mapping[str, int],
        dim: int = 128,
        layers: int = 1,
        speakers: int = 0,
        confidence: str = "label",
        fusion: str = "sum",
        head: str = "linear",
        scan: Mapping[str, int] | None = None,
        broad: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.classes, self.modalities = tuple(classes), tuple(m for m in MODALITIES if m in dims)
        if unknown := sorted(set(dims) - set(MODALITIES)):
            raise ValueError(f"dims names {unknown[0]!r}; expected some of {', '.join(MODALITIES)}")
        if len(self.classes) < 2 or not self.modalities or layers < 1:
            raise ValueError(
                f"there are {len(self.classes)} classes, {len(self.modalities)} modalities, {layers} layers; expected "
                "2, 1 and 1 or more"
            )
        for what, value, known in (
            ("confidence", confidence, CONFIDENCES), ("fusion", fusion, ("sum", "concat")),
            ("head", head, ("linear", "broad")),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{what} is {value!r}; expected one of {', '.join(known)}")
        self.dims, self.confidence, self.fusion = dict(dims), confidence, fusion
        self.context = nn.ModuleDict(
            {m: Context(dims[m], dim, layers, scan or {}, broad or {}, dropout) for m in self.modalities}
        )
        self.speaker = nn.Embedding(speakers, dim) if speakers else None
        self.heads = nn.ModuleDict({m: Linear(dim, len(self.classes)) for m in self.modalities})
        wide = dim * (len(self.modalities) if fusion == "concat" else 1)
        count = len(self.classes)
        self.classifier = BroadLearning(wide, count, **(broad or {})) if head == "broad" else Linear(wide, count)
        if self.speaker is not None:
            nn.init.normal_(self.speaker.weight, std=0.02)

    def forward(
        self,
        text: Tensor | None = None,
        audio: Tensor | None = None,
        visual: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        speaker: Tensor | None = None,
        present: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits of every utterance.

        text, audio, visual: (batch, utterances, features), those that the model has. lengths: (batch,) utterances of
        each dialogue; what stands behind changes nothing, and its outputs are 0. speaker: (batch, utterances) numbers.
        present: (batch, utterances, modalities) bool, which of the model's modalities an utterance has (default: all);
        an absent one takes no part in the fusion. labels: (batch, utterances), for ``confidence="label"`` in training.

        Returns "logits" (batch, utterances, classes), "weights" (batch, utterances, modalities) of the fusion, and each
        modality's own logits by its name.
        """
        parts = self.parts({"text": text, "audio": audio, "visual": visual}, lengths, speaker, present, labels)
        parts["logits"] = self.classifier(parts.pop("fused"))
        if lengths is None:
            return parts
        valid = self.valid(next(iter(parts.values())), lengths)
        return {name: torch.where(valid, value, 0) for name, value in parts.items()}

    def parts(
        self, given: Mapping[str, Tensor | None], lengths: Tensor | None, speaker: Tensor | None,
        present: Tensor | None, labels: Tensor | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """All but the last layer: "fused" (batch, utterances, D or modalities * D), "weights", modalities' logits."""
        features = self._checked(given)
        lead = next(iter(features.values())).shape[:2]
        like = next(iter(features.values()))
        if present is None:
            present = torch.ones(*lead, len(self.modalities), dtype=torch.bool, device=like.device)
        if present.shape != (*lead, len(self.modalities)):
            raise ValueError(
                f"present has shape {tuple(present.shape)}; expected {(*lead, len(self.modalities))}, of "
                f"{', '.join(self.modalities)}"
            )
        if lengths is not None:
            present = present & self.valid(like, lengths)
        who = None
        if self.speaker is not None:
            if speaker is None:
                raise ValueError(
                    "speaker is missing; this model tells speakers apart: give (batch, utterances) numbers"
                )
            who = self.speaker(speaker)
        hidden, found, sure = [], {}, []
        for i, m in enumerate(self.modalities):
            h = self.context[m](features[m], present[..., i : i + 1], who, lengths)
            found[m] = self.heads[m](h)
            hidden.append(h)
            sure.append(self._confidence(found[m], labels))
        weights = self.weigh(torch.stack(sure, dim=-1), present)
        each = [h * weights[..., i : i + 1] for i, h in enumerate(hidden)]
        fused = torch.cat(each, dim=-1) if self.fusion == "concat" else torch.stack(each).sum(0)
        return found | {"fused": fused, "weights": weights}

    @staticmethod
    def valid(like: Tensor, lengths: Tensor) -> Tensor:
        """(batch, utterances, 1): whether an utterance is one, not padding."""
        return (torch.arange(like.shape[1], device=like.device) < lengths[:, None])[..., None]

    def _checked(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        for m in self.modalities:
            x = given.get(m)
            lead = next(iter(features.values())).shape[:2] if features else None
            if x is None or x.dim() != 3 or x.shape[-1] != self.dims[m] or (lead is not None and x.shape[:2] != lead):
                seen = "missing" if x is None else f"of shape {tuple(x.shape)}"
                where = "(batch, utterances" if lead is None else f"({lead[0]}, {lead[1]}"
                raise ValueError(f"{m} is {seen}; expected {where}, {self.dims[m]})")
            features[m] = x
        return features

    def _confidence(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """How sure a modality is, (batch, utterances), 0 to 1."""
        if self.confidence == "entropy":
            log = logits.log_softmax(-1)
            return 1 + (log.exp() * log).sum(-1) / math.log(len(self.classes))
        chance = logits.softmax(-1)
        if self.confidence == "label" and self.training and labels is not None:
            return chance.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return chance.amax(-1)

    @staticmethod
    def weigh(sure: Tensor, present: Tensor) -> Tensor:
        """Softmax of the confidences over the modalities that are there; even weights where none is."""
        none = ~present.any(-1, keepdim=True)
        return sure.masked_fill(~present & ~none, -torch.inf).softmax(-1)

    @torch.no_grad()
    def solve_head(self, fused: Tensor, labels: Tensor, penalty: float) -> None:
        """Solve the broad head by ridge regression of one-hot labels (rows,) on fused vectors (rows, ...)."""
        if not isinstance(self.classifier, BroadLearning):
            raise ValueError("the head is linear; build the model with head='broad' to solve it by ridge regression")
        target = nn.functional.one_hot(labels, len(self.classes)).to(fused.dtype)
        self.classifier.solve(fused, target, penalty)


def emotion_loss(
    output: Mapping[str, Tensor], labels: Tensor, modality_weight: float = 1.0, class_weight: Tensor | None = None
) -> Tensor:
    """Cross entropy of the fused logits, and ``modality_weight`` times that of each modality's, over utterances whose
    label (batch, utterances) is not negative. class_weight: (classes,)."""
    known = labels.flatten()

    def entropy(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), known.clamp(min=-1), weight=class_weight, ignore_index=-1
        )

    own = sum((entropy(output[m]) for m in MODALITIES if m in output), labels.new_zeros(()).float())
    return entropy(output["logits"]) + modality_weight * own
