"""MOHAWK: distil a Transformer into a state-space student, in three stages.

1. *Matrix orientation*: each student mixer, fed the teacher's hidden states, learns the teacher's attention matrix.
2. *Hidden-state alignment*: each mixer (or whole block) learns the teacher's mixer (or block) output.
3. *Transfer and distillation*: embeddings, norms, MLPs and head are copied, then the whole student learns the teacher's
   next-token distribution.

The teacher is any causal language model of ``transformers`` (eager attention), or one of ours; the student is a
model of the zoo whose mixers have ``mixing_matrix``. Source: Bick et al., arXiv 2408.10189, section 4; stages 1 and 2
as in goombalab/phi-mamba ``assets/mohawk_stage{1,2}.py`` (stage 3 has no public code; it follows the paper).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.runs import Run

from .phi_mamba import PhiAttention, PhiBlock, PhiMambaLM


@dataclass
class TeacherOutput:
    """What a teacher shows for a batch: ``hidden`` (layers + 1), ``attention`` and ``mixed`` (one a layer), logits."""

    hidden: list[Tensor]
    attention: list[Tensor]
    mixed: list[Tensor]
    logits: Tensor


class Teacher(Protocol):
    """Anything that shows its layers."""

    def __call__(self, input_ids: Tensor, *, matrices: bool) -> TeacherOutput: ...


class ZooTeacher:
    """A Phi-shaped model of ours as the teacher."""

    def __init__(self, model: PhiMambaLM) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, *, matrices: bool) -> TeacherOutput:
        hidden = self.model.hidden_states(input_ids)
        attention, mixed = [], []
        for x, layer in zip(hidden, self.model.layers, strict=False):
            assert isinstance(layer, PhiBlock)
            n = layer.input_layernorm(x)
            mixed.append(layer.mixer(n))
            if matrices:
                assert isinstance(layer.mixer, PhiAttention)
                attention.append(layer.mixer.mixing_matrix(n))
        return TeacherOutput(hidden, attention, mixed, self.model.head(self.model.norm_f(hidden[-1])))


class TransformersTeacher:
    """A causal language model of ``transformers``.

    Its attention modules are found by name (``self_attn`` or ``attn`` in every layer); load it with
    ``attn_implementation="eager"``, since fused attention shows no matrices.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.attention = [
            module for name, module in model.named_modules() if name.rpartition(".")[2] in ("self_attn", "attn")
        ]
        if not self.attention:
            raise ValueError(f"{type(model).__name__} has no modules named self_attn or attn: no teacher for MOHAWK")

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, *, matrices: bool) -> TeacherOutput:
        mixed: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            mixed.append(output[0] if isinstance(output, tuple) else output)

        before: list[Tensor] = []

        def last(module: nn.Module, args: Any) -> None:
            before.append(args[0])

        hooks = [module.register_forward_hook(keep) for module in self.attention]
        # transformers returns the last hidden state after the final norm; MOHAWK needs it before: the norm's input.
        norm = final_norm(self.model)
        hooks.append(norm.register_forward_pre_hook(last))
        try:
            out = self.model(input_ids, output_hidden_states=True, output_attentions=matrices, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        attention = list(out.attentions or []) if matrices else []
        if matrices and (not attention or any(a is None for a in attention)):
            raise ValueError("the teacher shows no attention matrices: load it with attn_implementation='eager'")
        return TeacherOutput([*out.hidden_states[:-1], before[0]], attention, mixed, out.logits)


def final_norm(model: nn.Module) -> nn.Module:
    """The last norm before the head: the shallowest norm module of the backbone."""
    found = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if any(word in name.rpartition(".")[2] for word in ("final_layernorm", "final_layer_norm", "norm", "ln_f"))
        and not any(part.isdigit() for part in name.split("."))
    ]
    if not found:
        raise ValueError(f"{type(model).__name__}: no final norm found")
    return min(found, key=lambda entry: entry[:2])[2]


def matrix_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Stage 1: the Frobenius norm (not its square) of the difference, mean over batch and heads.

    Both (batch, heads, length, length). Raises ValueError where their heads are not as many.
    """
    _alike(student, teacher, "mixing matrices")
    return torch.linalg.matrix_norm(student.float() - teacher.float(), ord="fro").mean()


def hidden_state_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Stage 2: the L2 norm of the difference over channels, mean over batch and tokens. Both (batch, length, d)."""
    _alike(student, teacher, "hidden states")
    return torch.linalg.vector_norm(student.float() - teacher.float(), dim=-1).mean()


def _alike(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's {what} are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
            "a student has its teacher's width and heads"
        )


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Stage 3: cross entropy of the student's next-token distribution with the teacher's, mean over tokens.

    Logits (batch, length, vocabulary); the student's padded vocabulary is cut to the teacher's.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    target = teacher[..., :size].float().softmax(-1)
    return F.cross_entropy(student[..., :size].float().flatten(0, 1), target.flatten(0, 1))


def transfer(teacher: nn.Module, student: PhiMambaLM) -> list[str]:
    """Copy what teacher and student share (embedding, norms, MLPs, head) and return the names of what was copied.

    Reads Phi-shaped teachers: ours, or transformers' ``PhiForCausalLM``. Raises ValueError where shapes differ.
    """
    state = {k.removeprefix("model."): v for k, v in teacher.state_dict().items()}
    names = {"embed_tokens": "embedding", "final_layernorm": "norm_f"}
    copied = []
    target = student.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            ours = key
            for theirs, name in names.items():
                ours = ours.replace(theirs, name)
            if ours not in target or ".mixer." in ours:
                continue
            have = target[ours]
            if have.shape[1:] != value.shape[1:] or value.shape[0] > have.shape[0]:
                raise ValueError(f"{key} is {tuple(value.shape)} in the teacher, {tuple(have.shape)} in the student")
            have[: value.shape[0]].copy_(value)  # a padded vocabulary has more rows
            copied.append(ours)
    return copied


@dataclass
class Report:
    """The losses of a stage: one row a step; for stages 1 and 2 one number a layer."""

    stage: int
    losses: list[list[float]] = field(default_factory=list)


def distil(
    stage: int,
    teacher: Teacher,
    student: PhiMambaLM,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    train_mlp: bool = False,
    on_step: Callable[[int, list[float]], None] | None = None,
    run: Run | None = None,
    **parts: Any,
) -> Report:
    """Run one stage over ``batches`` of token ids (batch, length).

    Stages 1 and 2 train every layer on the teacher's own hidden state before it, so layers learn independently;
    ``train_mlp`` aligns block outputs instead of mixer outputs in stage 2. In stages 1 and 2 embedding, final norm and
    head get no gradient; attention blocks of a hybrid are left alone in stage 1. Clip or schedule through
    ``optimizer``; gradients are zeroed here. ``run``: keeps it, and goes on with what it holds: of the same
    ``batches``, those that were done are passed over; ``parts``: what else has a state, as a schedule that ``on_step``
    moves (see :meth:`zoo.runs.Run.start`).
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"stage is {stage}; expected 1 (matrices), 2 (hidden states) or 3 (distillation)")
    run = run or Run()
    report = Report(stage, run.start(student=student, optimizer=optimizer, **parts).get("losses", []))
    student.train()
    for step, ids in itertools.islice(enumerate(batches), len(report.losses), None):
        optimizer.zero_grad(set_to_none=True)
        shown = teacher(ids, matrices=stage == 1)
        values = []
        if stage == 3:
            loss = distillation_loss(student(ids), shown.logits)
            loss.backward()
            values.append(float(loss.detach()))
        else:
            if len(shown.mixed) != len(student.layers):
                raise ValueError(f"the teacher has {len(shown.mixed)} layers, the student {len(student.layers)}")
            for i, layer in enumerate(student.layers):
                assert isinstance(layer, PhiBlock)
                if stage == 1 and isinstance(layer.mixer, PhiAttention):
                    continue
                loss = _layer_loss(stage, layer, i, shown, train_mlp)
                loss.backward()
                values.append(float(loss.detach()))
        optimizer.step()
        report.losses.append(values)
        if on_step is not None:
            on_step(step, values)
        run.keep(step + 1, losses=report.losses)
    student.eval()
    return report


def _layer_loss(stage: int, layer: PhiBlock, i: int, shown: TeacherOutput, train_mlp: bool) -> Tensor:
    x = shown.hidden[i]
    if stage == 1:
        return matrix_loss(layer.mixer.mixing_matrix(layer.input_layernorm(x)), shown.attention[i])  # type: ignore[union-attr, operator]
    if train_mlp:
        return hidden_state_loss(layer(x), shown.hidden[i + 1])
    return hidden_state_loss(layer.mixer(layer.input_layernorm(x)), shown.mixed[i])
