"""Turning a softmax model into mmMamba: seeding, and the three stages of distillation.

1. *Layer by layer, the new parts*: each mixer reads what the teacher's layer reads and learns the teacher's attention
   heads (before the output projection); v, k and q are the teacher's, shared and frozen.
2. *Layer by layer, the whole mixer*: v, k and q learn too; a frozen copy of the teacher's gives the target.
3. *End to end*: the student's next-token distribution learns the teacher's.

Paper: arXiv 2502.13145, section 3. Original: hustvl/mmMamba @ 85143d0, MIT (``distill_mmMamba.py``,
``src/trainer/distill_every_layer.py``, ``src/trainer/default_lm.py``, ``configs/experiment``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.runs import Run

from .mmmamba import MmMamba
from .mmmamba_mixers import Mamba2Attention, Phases, SoftmaxAttention
from .mmmamba_parts import DecoderLayer

MSE_FACTOR = 1000.0

#: Of a Mamba layer, (student heads, teacher heads), (batch, length, H, P) each; None for a softmax layer.
Pair = tuple[Tensor, Tensor] | None


# -- seeding


@torch.no_grad()
def seed(
    teacher: MmMamba,
    student: MmMamba,
    *,
    inherit_qkv: bool = True,
) -> list[str]:
    """Fill a student with what its softmax teacher has, and return the names of what the student keeps of its own.

    The two have the same sizes; layers that are softmax in both, embeddings, norms, feed-forward layers and the head
    are copied; ``wo`` becomes ``o_proj``, and with ``inherit_qkv`` the rows of ``wqkv`` become v, k and q. Convolution,
    dt, A, gate and norm stay as :meth:`Mamba2Attention.reset_parameters` sets them. Raises ValueError where a layer or
    a shape has no counterpart.
    """
    theirs, ours = dict(teacher.state_dict()), student.state_dict()
    for name, old, new in _mixers(teacher, student):
        if not isinstance(new, Mamba2Attention):
            continue
        if not isinstance(old, SoftmaxAttention):
            raise ValueError(f"{name} is {type(old).__name__} in the teacher; a Mamba layer is seeded from softmax")
        vkq = vkq_of(old)
        theirs[f"{name}.o_proj.weight"] = theirs.pop(f"{name}.wo.weight")
        if old.wo.bias is not None:
            theirs[f"{name}.o_proj.bias"] = theirs.pop(f"{name}.wo.bias")
            del theirs[f"{name}.wqkv.bias"]  # the mixer has no place for it, in the original either
        theirs.pop(f"{name}.wqkv.weight")
        if inherit_qkv:
            theirs[f"{name}.vkq_proj.weight"] = vkq
        if new.shadow_proj is not None:
            theirs[f"{name}.shadow_proj.weight"] = vkq
    odd = [
        f"{k} ({tuple(v.shape)} in the teacher)" for k, v in theirs.items() if k not in ours or ours[k].shape != v.shape
    ]
    if odd:
        raise ValueError(f"teacher and student do not fit: {', '.join(odd[:5])}")
    for key, value in theirs.items():
        ours[key].copy_(value)
    return [key for key in ours if key not in theirs]


def vkq_of(attention: SoftmaxAttention) -> Tensor:
    """The rows [v; k; q] of an attention's grouped ``wqkv``, ((H + 2 G) P, D)."""
    rows = attention.wqkv.weight.unflatten(0, (attention.kv_heads, -1, attention.head_dim))
    return torch.cat([rows[:, -1].flatten(0, 1), rows[:, -2].flatten(0, 1), rows[:, :-2].flatten(0, 2)])


def _mixers(teacher: MmMamba, student: MmMamba) -> Iterable[tuple[str, nn.Module, nn.Module]]:
    for stack in ("embedding", "language"):
        old, new = (getattr(m, stack).layers for m in (teacher, student))
        if len(old) != len(new):
            raise ValueError(f"the teacher's {stack} stack has {len(old)} layers, the student's {len(new)}")
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield f"{stack}.layers.{i}.attention", a.attention, b.attention


# -- losses


@dataclass
class Aligned:
    """A pass in which every layer hands on the teacher's output: pairs of all layers, and the logits at its end."""

    pairs: list[Pair]
    logits: Tensor


def alignment_pass(
    model: MmMamba,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    hd_input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    hd_position_ids: Tensor | None = None,
    padding: Tensor | None = None,
) -> Aligned:
    """Stages 1 and 2: what each Mamba layer gives and should give for the same input, the teacher's."""
    pairs: list[Pair] = []

    def run(layer: DecoderLayer, x: Tensor, phases: Phases | None, padding: Tensor | None) -> Tensor:
        mixer = layer.attention
        if not isinstance(mixer, Mamba2Attention):
            pairs.append(None)
            with torch.no_grad():
                return layer(x, phases, padding=padding)
        assert phases is not None
        with torch.no_grad():
            n = layer.attention_norm(x)
            wanted = mixer.teacher(n, phases)
            passed_on = layer.after_attention(x + mixer.o_proj(wanted.flatten(2)))
        pairs.append((mixer.head_outputs(n, distilling=True), wanted))
        return passed_on

    x = model.hidden(input_ids, pixel_values, hd_input_ids, position_ids, hd_position_ids, run=run, padding=padding)
    with torch.no_grad():
        return Aligned(pairs, model.output(model.norm(x)))


def alignment_loss(pairs: Sequence[Pair]) -> Tensor:
    """The mean over Mamba layers of the squared difference of the heads, times 1000. Raises ValueError without any."""
    losses = [F.mse_loss(*pair) for pair in pairs if pair is not None]
    if not losses:
        raise ValueError("the model has no Mamba layer: nothing is distilled")
    return torch.stack(losses).mean() * MSE_FACTOR


def distribution_loss(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    """Stage 3: KL(teacher || student) of the next token, summed over tokens, mean over the batch (temperature 1).

    Logits (batch, length, vocabulary). With ``labels`` (batch, length; -100 is left out) the cross entropy of the next
    token is added.
    """
    target = teacher.softmax(-1)
    loss = F.kl_div(student.log_softmax(-1), target, reduction="batchmean")
    if labels is None:
        return loss
    return loss + F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


# -- schedule and optimizer


def wsd(step: int, warmup: int, stable: int, decay: int) -> float:
    """The share of the learning rate at a step: linear warm-up, stable, half a cosine to 0, then 0."""
    if step < warmup:
        return step / max(1, warmup)
    if step < warmup + stable:
        return 1.0
    if step < warmup + stable + decay:
        return 0.5 * (1 + math.cos(math.pi * (step - warmup - stable) / max(1, decay)))
    return 0.0


@dataclass(frozen=True)
class StageSettings:
    """One stage's recipe; ``steps`` are optimizer steps: warm-up, stable, decay."""

    learning_rate: float
    steps: tuple[int, int, int]
    weight_decay: float = 0.05
    accumulation: int = 8
    max_steps: int = 20000

    @property
    def total(self) -> int:
        return min(sum(self.steps), self.max_steps)

    def scaled(self, total: int) -> StageSettings:
        """The same shape in ``total`` steps."""
        if total < 1:
            raise ValueError(f"the number of steps is {total}; expected at least 1")
        every = sum(self.steps)
        warm, decay = (round(total * n / every) for n in (self.steps[0], self.steps[2]))
        return replace(self, steps=(warm, total - warm - decay, decay), max_steps=total)


#: The published recipe (configs/experiment/distill_stage{1,2,3}_mmMamba.yaml). Stage 2 stops before its schedule ends.
STAGES: Mapping[int, StageSettings] = {
    1: StageSettings(1e-3, (2000, 16000, 2000)),
    2: StageSettings(5e-4, (5000, 40000, 5000)),
    3: StageSettings(5e-5, (2000, 16000, 2000)),
}
#: Names (inside a mixer) that a stage trains.
TRAINED = {
    1: ("dt_proj", "dt_bias", "A_log_bias", "conv1d", "D", "q_norm", "k_norm", "g_proj", "g_norm"),
    2: ("vkq_proj", "dt_proj", "dt_bias", "A_log_bias", "conv1d", "D", "q_norm", "k_norm", "g_proj", "g_norm"),
    3: ("vkq_proj", "dt_proj", "conv1d", "D", "q_norm", "k_norm", "g_proj", "g_norm"),
}


def trained_parameters(model: MmMamba, stage: int) -> dict[str, nn.Parameter]:
    """Freeze everything but what ``stage`` trains, and return that by name. Raises ValueError for another stage."""
    if stage not in TRAINED:
        raise ValueError(f"stage is {stage!r}; expected 1 (new parts), 2 (whole mixers) or 3 (end to end)")
    model.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, Mamba2Attention):
            for own, parameter in module.named_parameters():
                if own.partition(".")[0] in TRAINED[stage]:
                    found[f"{name}.{own}"] = parameter.requires_grad_(True)
    if not found:
        raise ValueError("the model has no Mamba layer: nothing is distilled")
    return found


def optimizer_of(parameters: Mapping[str, nn.Parameter], settings: StageSettings) -> torch.optim.AdamW:
    """AdamW, with weight decay on all but biases (``dt_bias`` and ``A_log_bias`` are such by name)."""
    decayed = [p for name, p in parameters.items() if not name.endswith("bias")]
    free = [p for name, p in parameters.items() if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate)


# -- the loop


@dataclass
class Batch:
    """What a step reads; see :meth:`MmMamba.forward`. ``labels``: only for an added cross entropy in stage 3."""

    input_ids: Tensor
    pixel_values: Tensor | None = None
    hd_input_ids: Tensor | None = None
    labels: Tensor | None = None

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ids, pixels, hd = (None if t is None else t.to(device) for t in self.texts())
        assert ids is not None
        return ids, pixels, hd

    def texts(self) -> tuple[Tensor | None, ...]:
        return self.input_ids, self.pixel_values, self.hd_input_ids


def stage_loss(model: MmMamba, batch: Batch, stage: int, teacher: MmMamba | None = None) -> Tensor:
    """The loss of one batch. Stage 3 needs ``teacher``, the softmax model."""
    ids, pixels, hd = batch.inputs(model.device)
    if stage != 3:
        return alignment_loss(alignment_pass(model, ids, pixels, hd).pairs)
    if teacher is None:
        raise ValueError("stage 3 learns from the teacher's logits: give teacher=")
    with torch.no_grad():
        target = teacher(ids, pixels, hd_input_ids=hd)
    labels = None if batch.labels is None else batch.labels.to(model.device)
    return distribution_loss(model(ids, pixels, hd_input_ids=hd), target, labels)


def distil(
    model: MmMamba,
    batches: Iterable[Batch],
    stage: int,
    *,
    teacher: MmMamba | None = None,
    settings: StageSettings | None = None,
    on_step: Callable[[int, float], None] | None = None,
    run: Run | None = None,
) -> list[float]:
    """Run one stage and return its losses, one an optimizer step (the mean over its ``accumulation`` batches).

    ``model``: the student, seeded (:func:`seed`) or from the stage before; for stage 2 it needs shadows
    (:func:`with_shadows`). Ends after ``settings.total`` steps or when ``batches`` do. The student comes back in eval
    mode with every parameter trainable but the shadows. ``run``: keeps it (of the model, what the stage trains), and
    goes on with what it holds: of the same ``batches``, those that were done are passed over.
    """
    settings = STAGES[stage] if settings is None and stage in STAGES else settings
    chosen = trained_parameters(model, stage)
    assert settings is not None
    mixers = [m for m in model.modules() if isinstance(m, Mamba2Attention)]
    if stage == 2 and any(m.shadow_proj is None for m in mixers):
        raise ValueError("stage 2 needs the teacher's v, k and q beside the student's: call with_shadows first")
    optimizer = optimizer_of(chosen, settings)
    warmup, stable, decay = settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: wsd(step, warmup, stable, decay))
    run = run or Run()
    kept = run.start(trained=nn.ParameterList(chosen.values()), optimizer=optimizer, schedule=schedule)
    model.train()
    losses: list[float] = kept.get("losses", [])
    gathered: list[float] = []
    for batch in itertools.islice(batches, len(losses) * settings.accumulation, None):
        if len(losses) >= settings.total:
            break
        loss = stage_loss(model, batch, stage, teacher)
        (loss / settings.accumulation).backward()
        gathered.append(float(loss.detach()))
        if len(gathered) == settings.accumulation:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(sum(gathered) / len(gathered))
            gathered = []
            if on_step is not None:
                on_step(len(losses), losses[-1])
            run.keep(len(losses), losses=losses)
    model.requires_grad_(True).eval()
    for mixer in mixers:
        if mixer.shadow_proj is not None:
            mixer.shadow_proj.requires_grad_(False)
    return losses


@torch.no_grad()
def with_shadows(model: MmMamba, teacher: MmMamba) -> MmMamba:
    """Give every Mamba layer of ``model`` a frozen copy of the teacher's v, k and q (stage 2), in place."""
    for name, old, new in _mixers(teacher, model):
        if isinstance(new, Mamba2Attention):
            if not isinstance(old, SoftmaxAttention):
                raise ValueError(f"{name} is {type(old).__name__} in the teacher; expected softmax attention")
            rows = vkq_of(old).clone()
            shadow = nn.utils.skip_init(type(new.vkq_proj), rows.shape[1], rows.shape[0], bias=False)
            shadow.weight = nn.Parameter(rows.to(new.vkq_proj.weight), requires_grad=False)
            new.shadow_proj = shadow
    return model


def without_shadows(model: MmMamba) -> MmMamba:
    """Take the copies away again, in place: what stage 2 leaves for stage 3 and for use."""
    for module in model.modules():
        if isinstance(module, Mamba2Attention):
            module.shadow_proj = None
    return model


def student_arguments(arguments: Mapping[str, Any], softmax: tuple[Sequence[int], Sequence[int]]) -> dict[str, Any]:
    """A student's arguments from its teacher's: the same, with softmax kept in the named layers of each stack."""
    found = dict(arguments)
    for stack, kept in zip(("embedding", "language"), softmax, strict=True):
        found[stack] = {**arguments[stack], "softmax": list(kept)}
    return found
