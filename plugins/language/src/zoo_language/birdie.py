"""Birdie: state-space language models trained on a mixture of objectives that a reward model keeps choosing.

Paper: Blouir et al., arXiv 2411.01030 (EMNLP 2024). Original: samblouir/birdie @ b81f78e: the reward model, the agent's
arithmetic, objectives and packing are public and replayed here. The language models are not: see
:mod:`zoo_language.birdie_lm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rules
from zoo_kernels import linear_scan

from .birdie_objectives import CharacterTokenizer, NoSample, objective
from .birdie_packing import Packer

# -- public pieces: norms, the Gated SSM block, the reward model
# ---------------------------------------------------------


class RMSNorm(nn.Module):
    """``scale * x / (||x|| / sqrt(d) + 1e-8)``: the epsilon is added after the root."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + 1e-8)


class RMSSplit(nn.Module):
    """RMSNorm, times a second scale (0.1 at first), and optionally a projection without bias."""

    def __init__(self, dims: int, out: int | None = None) -> None:
        super().__init__()
        self.norm, self.scale = RMSNorm(dims), nn.Parameter(torch.full((dims,), 0.1))
        self.out = None if out is None else nn.Linear(dims, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * self.scale
        return x if self.out is None else self.out(x)


class GatedSSM(nn.Module):
    """The repository's Gated SSM block: ``h_t = K_{t-1} h_{t-1} + u_t`` (decayed by the gate of the step before)."""

    def __init__(self, dims: int, state_size_mult: int = 2) -> None:
        super().__init__()
        size = dims * state_size_mult
        self.norm = RMSSplit(dims)
        self.K_proj, self.ugg_proj = nn.Linear(dims, size, bias=False), nn.Linear(dims, 3 * size, bias=False)
        self.out_proj = nn.Linear(size, dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        K = torch.sigmoid(self.K_proj(n))
        u, g_in, g_out = self.ugg_proj(n).chunk(3, dim=-1)
        u = u * torch.sigmoid(g_in) * (1 - K)
        h, _ = linear_scan(u, F.pad(K, (0, 0, 1, -1)))
        return self.out_proj(h * torch.sigmoid(g_out)) + x


class SwiGLU(nn.Module):
    """``wo(main * sigmoid(gate)) + x`` (a sigmoid, not a SiLU)."""

    def __init__(self, dims: int, hidden: float) -> None:
        super().__init__()
        self.norm = RMSSplit(dims)
        self.wi, self.wo = nn.Linear(dims, 2 * int(hidden), bias=False), nn.Linear(int(hidden), dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        main, gate = self.wi(self.norm(x)).chunk(2, dim=-1)
        return self.wo(main * torch.sigmoid(gate)) + x


def reward_frequencies(head_dims: int, *, scaled: bool, old_length: int = 32768) -> Tensor:
    """Radians per position of each pair of channels; ``scaled`` as Llama 3 stretches slow ones (factor 8, 1 to 4)."""
    frequency = 1.0 / 500000.0 ** (torch.arange(0, head_dims, 2)[: head_dims // 2].float() / head_dims)
    if not scaled:
        return frequency
    turns = old_length * frequency / (2 * math.pi)  # of the old context's length: above 4 kept, below 1 stretched
    blend = ((turns - 1) / 3).clamp(0, 1)
    return (1 - blend) * frequency / 8 + blend * frequency


class RewardAttention(nn.Module):
    """Grouped attention with exactly two key-value heads. Rows and columns from ``length`` on attend to nothing.

    ``rotary``: the frequencies of its positions, or None for none. Channels that fill no whole head are left out of the
    queries, as in the original.
    """

    def __init__(self, dims: int, head_dims: int, rotary: Tensor | None = None) -> None:
        super().__init__()
        heads = dims // head_dims
        if not heads or heads % 2:
            raise ValueError(f"dims {dims} hold {heads} heads of {head_dims}; two key-value heads need an even number")
        self.head_dims = head_dims
        self.norm = RMSSplit(dims)
        self.q_proj = nn.Linear(dims, heads * head_dims, bias=False)
        self.o_proj = nn.Linear(heads * head_dims, dims, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(dims, 2 * head_dims, bias=False) for _ in range(2))
        self.register_buffer("rotary", rotary, persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        """Rotate neighbouring channels of x (batch, heads, length, channels) by position."""
        if self.rotary is None:
            return x
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * self.rotary
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)

    def forward(self, x: Tensor, length: int) -> Tensor:
        n = self.norm(x)
        q, k, v = (
            proj(n).unflatten(-1, (-1, self.head_dims)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.turn(q), self.turn(k)
        rows = torch.arange(x.shape[1], device=x.device)
        seen = (rows[:, None] >= rows) & (rows[:, None] < length) & (rows < length)
        # A row without any key may attend to anything here: its output is set to zero below.
        mask = seen | ~seen.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True) * (rows < length)[:, None]
        return self.o_proj(out.transpose(1, 2).flatten(-2)) + x


class RewardModel(nn.Module):
    """Losses and actions so far in, predicted rewards out: (batch, max_seq_len, input_dim) to (..., output_dim).

    ``current_seq_len``: steps that exist. ``rotary``: with positions; the agent builds it without.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        max_seq_len: int = 2048,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        head_dims = hidden_dims[-2] // 4 if len(hidden_dims) > 1 else 64
        turns = reward_frequencies(head_dims, scaled=max_seq_len != 2048) if rotary else None
        layers: list[nn.Module] = [RMSSplit(input_dim, hidden_dims[0])]
        for dims in hidden_dims:
            layers += [RewardAttention(dims, head_dims, turns), SwiGLU(dims, dims * (8 / 3))]
        layers += [RMSSplit(hidden_dims[-1]), nn.Linear(hidden_dims[-1], output_dim, bias=False)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, current_seq_len: int) -> Tensor:
        if x.shape[1] != self.max_seq_len:
            raise ValueError(f"the input has {x.shape[1]} steps; the reward model reads max_seq_len {self.max_seq_len}")
        for layer in self.layers:
            x = layer(x, current_seq_len) if isinstance(layer, RewardAttention) else layer(x)
        return torch.tanh(x)


# -- the agent's arithmetic
# ---------------------------------------------------------------------------------------------


def reward(old: Tensor, new: Tensor) -> Tensor:
    """How much a loss improved, from -1 to 1: ``-100 e tanh(e sqrt(old new) ((new - old) / old)^3)``, clipped."""
    change = ((new - old) / (old + 1e-8)) ** 3
    value = -100 * math.e * torch.tanh(math.e * torch.sqrt(old * new) * change)
    return value.clamp(-1, 1).nan_to_num(0.0)


def scale_actions(actions: Tensor) -> Tensor:
    """Probabilities from raw actions (..., n): the least entry is subtracted when any is negative, then normalised.

    For a batch, rows are shifted as soon as any entry of the whole batch is negative, as in the original.
    """
    if bool((actions < 0).any()):
        actions = actions - actions.min(-1, keepdim=True).values
    return actions / actions.sum(-1, keepdim=True)


def exploration(
    step: int,
    total_steps: int,
    min_val: float = 0.0,
    max_val: float = 1.0,
    warmup_steps: int = 0,
    cook_steps: int = 0,
    cook_val: float = 1.0,
    decay_factor: float = 1.0,
) -> float:
    """The chance to explore at ``step``: ``cook_val`` first, then a cosine from ``max_val`` down to ``min_val``.

    Never, where ``max_val`` is 0.
    """
    if max_val <= 0:
        return 0.0
    if step < cook_steps:
        return cook_val
    span = total_steps - 1 - warmup_steps
    t = min(max(step - warmup_steps, 0), span)
    middle = (max_val + min_val) / 2
    decay = decay_factor ** (t / (2 * total_steps - 2))
    value = middle + (max_val - middle) * decay * math.cos(math.pi * t / span)
    return min(max(value, min_val), max_val)


class Agent:
    """Chooses how often each objective is trained on, from how the losses answered to earlier choices.

    ``groups[i]`` is the class of objective i (configurations of one objective share a class). :meth:`observe` after
    each evaluation, :meth:`action` for the next mixture. Original: ``AgentBird``; the reward model is trained on the
    whole history after each evaluation, 200 AdamW steps.
    """

    def __init__(
        self, groups: Sequence[int], total_steps: int, *, hidden_dims: Sequence[int] = (256,) * 4, max_evaluations:
        int = 512, candidates: int = 4096, seed: int = 0, explore: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.groups, self.total_steps, self.candidates = list(groups), total_steps, candidates
        count = len(self.groups)
        self.model = RewardModel(2 * count, count, hidden_dims, max_evaluations)
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []  # old losses, action, reward
        self.losses: Tensor | None = None
        self.random = np.random.default_rng(seed)
        self.explore = dict(explore or {})
        self.last_action = torch.full((count,), 1 / count)
        sizes = {g: self.groups.count(g) for g in self.groups}
        self.weights = torch.tensor([len(sizes) / sizes[g] for g in self.groups])

    def observe(self, losses: Sequence[float], *, steps: int = 200) -> None:
        """The losses of every objective after training with the last action; the reward model learns from them."""
        new = torch.tensor(losses, dtype=torch.float32)
        if new.shape != self.last_action.shape:
            raise ValueError(f"{len(losses)} losses for {len(self.groups)} objectives")
        if self.losses is not None:
            self.history.append((self.losses, self.last_action, reward(self.losses, new)))
            if len(self.history) >= self.model.max_seq_len:
                raise ValueError(f"more than {self.model.max_seq_len - 1} evaluations; give a larger max_evaluations")
            self._learn(steps)
        self.losses = new

    def _padded(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, self.model.max_seq_len - rows.shape[-2]))

    def _learn(self, steps: int) -> None:
        inputs = torch.stack([torch.cat([old, action]) for old, action, _ in self.history])
        target = torch.stack([value for _, _, value in self.history])
        optimizer = torch.optim.AdamW(self.model.parameters(), 5e-4, weight_decay=0.1)
        cycle = torch.optim.lr_scheduler.CyclicLR(
            optimizer, 5e-7, 5e-4, step_size_up=100, mode="exp_range", cycle_momentum=False
        )
        for _ in range(steps):
            optimizer.zero_grad()
            found = self.model(self._padded(inputs[None]), len(inputs))[0, : len(inputs)]
            F.mse_loss(found, target).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            cycle.step()

    @torch.no_grad()
    def action(self, step: int) -> Tensor:
        """Probabilities of the objectives for the next period, (objectives,)."""
        if self.losses is None or not self.history:
            return self.last_action
        options = self._options(explore=self.random.uniform() < exploration(step, self.total_steps, **self.explore))
        past = torch.stack([torch.cat([old, action]) for old, action, _ in self.history])
        found = []
        for chunk in options.split(256):
            last = torch.cat([self.losses.expand(len(chunk), -1), chunk], dim=1)[:, None]
            rows = torch.cat([past.expand(len(chunk), -1, -1), last], dim=1)
            found.append(self.model(self._padded(rows), rows.shape[1])[:, rows.shape[1] - 1])
        value = (torch.cat(found) * self.weights).sum(-1)
        best = options[value.topk(min(8, len(options))).indices].mean(0)
        self.last_action = best / best.sum()
        return self.last_action

    def _options(self, *, explore: bool) -> Tensor:
        """Candidate mixtures: uniform ones, three heavy-tailed blocks; when exploring, a bet on one or two classes."""
        count, block = len(self.groups), self.candidates // 4
        first = self.random.uniform(size=(block, count))
        if explore:
            chosen = self.random.choice(sorted(set(self.groups)), int(self.random.integers(1, 3)))
            inside = np.isin(self.groups, chosen)
            first = np.where(inside, self.random.uniform(size=count), 0.05 * self.random.uniform(size=count))[None]
        tails = [(self.random.pareto(a, size=(block, count)) + 1) * m for m, a in ((5, 3), (3, 2), (2, 1))]
        rows = torch.tensor(np.concatenate([first, *tails]), dtype=torch.float32)
        return rows / rows.sum(-1, keepdim=True)


# -- the original's format
# ----------------------------------------------------------------------------------------------


class Replay(nn.Module):
    """A golden file without weights: objectives, packing, or the agent's arithmetic."""

    def __init__(self, config: Mapping[str, Any], kind: str) -> None:
        super().__init__()
        self.config, self.kind = dict(config), kind

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return getattr(self, self.kind)(inputs)

    def agent(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raw = inputs["raw_actions"]
        return {
            "schedule": torch.tensor(
                [exploration(int(s), **self.config) for s in inputs["steps"]], dtype=torch.float64
            ),
            "reward": reward(inputs["old_losses"], inputs["new_losses"]),
            "scaled_actions": torch.stack([scale_actions(row) for row in raw]),
            "scaled_actions_batch": scale_actions(raw),
        }

    def objectives(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokenizer = CharacterTokenizer()
        text = tokenizer.decode(inputs["text_codes"].tolist())
        found = {}
        for name, settings in self.config.items():
            try:
                sample = objective(name.partition("_")[2], settings, tokenizer)(text)
            except NoSample as error:  # the original answers with a status, and with what it has
                if error.sample is None:
                    continue
                sample = error.sample
            for part in ("input_ids", "label_ids", "unused_input_ids"):
                if getattr(sample, part):
                    found[f"{name}.{part}"] = torch.tensor(getattr(sample, part))
        return found

    def packer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        c = self.config
        packer = Packer(
            c["batch_size"], c["sequence_length"], c.get("minimum_sequence_length", 64),
            c.get("start_generating_id", 2), c.get("max_samples_per_packer"),
        )  # fmt: skip
        status = []
        for i in range(sum(k.startswith("input") for k in inputs)):
            sample = inputs[f"input{i}"].tolist(), inputs[f"label{i}"].tolist()
            status.append(int(packer.add(*sample)) if packer.can_accept(*sample) else -1)
        batch = {k: torch.from_numpy(v) for k, v in packer.pop().items()}
        return {"add_status": torch.tensor([*status, 9], dtype=torch.float32), **batch}


class BirdieAdapter(ReferenceAdapter):
    """Reads samblouir/birdie's public pieces: Gated SSM block, reward model, objectives, packer, agent arithmetic."""

    system = "birdie"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "total_steps" in config:
            return Replay(config, "agent")
        if "sequence_length" in config:
            return Replay(config, "packer")
        # Dropout is built and never applied in the original; num_heads is read by nothing.
        given = {k: v for k, v in config.items() if k not in ("dropout_rate", "num_heads", "device")}
        if "input_dim" in config:
            model: nn.Module = RewardModel(**given, rotary=bool(config.get("device")))  # its positions hang on a device
        elif "dims" in config:
            model = GatedSSM(**given)
        elif config and all(k.split("_")[0].isdigit() for k in config):
            return Replay(config, "objectives")
        else:
            raise ValueError(f"birdie: the keys {sorted(config)} belong to nothing that its repository holds")
        return self.load(model, state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules()

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, Replay):
            return model(inputs)
        if isinstance(model, RewardModel):
            length = call["kwargs"]["current_seq_len"] if isinstance(call, Mapping) else model.max_seq_len
            found: dict[str, Tensor] = {}

            def keep(_module: nn.Module, _args: Any, out: Tensor) -> None:
                found["mid/after_first_attention"] = out

            hook = model.layers[1].register_forward_hook(keep)
            try:
                return {"y": model(inputs["x"], length), **found}
            finally:
                hook.remove()
        return {"y": model(inputs["x"])}
