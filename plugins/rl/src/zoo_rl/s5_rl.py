"""S5 with resets: a recurrent actor-critic whose episodes end inside a parallel scan.

Paper: Lu et al., "Structured State Space Models for In-Context Reinforcement Learning", arXiv 2303.03982. Original:
luchris429/popjaxrl @ 12e5d42 (``algorithms/s5.py``, ``algorithms/ppo_s5.py``; no licence stated). Differs from the
original: the batch comes first, widths are arguments, and one step is a call of its own (:meth:`S5ActorCritic.step`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, S5Layer, hippo
from zoo.layers.linear import Linear
from zoo.layers.s5 import State
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules, Transpose

#: What an actor-critic remembers: one dictionary of a tensor (batch, P) complex a layer.
Memory = list[State]


class S5Stack(nn.Module):
    """``n_layers`` :class:`~zoo.layers.S5Layer` of width ``d_model``, whose states are dropped where episodes begin.

    ``ssm_size`` is the real system's size, as everywhere in the zoo: with ``conj_sym`` half as many complex states.
    ``do_norm``: a LayerNorm before (``prenorm``) or after each layer; ``do_gtrxl_norm``: the same one right after the
    scan. ``activation``, ``C_init``, ``discretization``, ``clip_eigs``: see :class:`~zoo.layers.S5Layer` and
    :class:`~zoo.layers.S5`.
    """

    def __init__(
        self,
        d_model: int,
        ssm_size: int,
        n_layers: int,
        *,
        activation: str = "full_glu",
        do_norm: bool = False,
        prenorm: bool = False,
        do_gtrxl_norm: bool = False,
        conj_sym: bool = True,
        clip_eigs: bool = False,
        C_init: str = "lecun_normal",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            S5Layer(
                d_model, ssm_size, activation=activation, prenorm=prenorm, outer_norm=do_norm, inner_norm=do_gtrxl_norm,
                norm="layer" if do_norm or do_gtrxl_norm else None, conj_sym=conj_sym, clip_eigs=clip_eigs,
                C_init=C_init, discretization=discretization, dt_min=dt_min, dt_max=dt_max,
            )
            for _ in range(n_layers)
        )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The original's sizes of B, C and the gates, where its fan-in is not that of :class:`~zoo.layers.S5`."""
        with torch.no_grad():
            for layer in self.layers:
                seq = layer.seq
                seq.B.mul_(math.sqrt(seq.d_model / seq.ssm_size))  # type: ignore[union-attr, operator]
                if seq.C_init == "lecun_normal":  # type: ignore[union-attr]
                    # Flax counts every axis but the last two into the fan-in: H times as many.
                    seq.C.mul_(seq.d_model**-0.5)  # type: ignore[union-attr, operator]
                for name in ("out1", "out2"):
                    gate = getattr(layer, name, None)
                    if gate is not None:
                        std = gate.weight.shape[1] ** -0.5 / 0.87962566103423978
                        nn.init.trunc_normal_(gate.weight, std=std, a=-2 * std, b=2 * std)
                        nn.init.zeros_(gate.bias)

    def init_state(self, batch: int) -> Memory:
        """Memory at rest: zeros."""
        return [layer.init_state(batch) for layer in self.layers]  # type: ignore[union-attr, operator, misc]

    def forward(
        self, x: Tensor, *, resets: Tensor | None = None, state: Memory | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """(batch, length, d_model) to the same, all steps at once.

        resets: (batch, length) bool; where it is set the step is the first of an episode, and what was remembered is
        dropped before its input is added. state: continued, and left at the end. lengths: (batch,) steps that count.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, state=None if state is None else state[i], resets=resets, lengths=lengths)
        return x

    def step(self, x: Tensor, state: Memory, *, reset: Tensor | None = None) -> Tensor:
        """(batch, d_model) to the same; ``state`` moves on in place. reset: (batch,) bool."""
        for layer, inside in zip(self.layers, state, strict=True):
            x = layer.step(x, inside, reset=reset)  # type: ignore[union-attr, operator]
        return x


class S5ActorCritic(GradCheckpointing, nn.Module):
    """Two dense layers, an S5 stack, an actor and a critic: observations to action parameters and values.

    Arguments: ``obs_dim`` (with the previous action and the first-step flag, if the environment appends them: see
    :class:`zoo_rl.envs.PreviousAction`), ``action_dim``, ``continuous`` (a diagonal Gaussian of learnt, constant
    deviation; else logits), ``d_model``, ``encoder_dim`` and ``body_dim`` (the original's constants 256, 128 and 128),
    ``no_reset`` (the original's NO_RESET: ``resets`` are ignored), and those of :class:`S5Stack`.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        continuous: bool = False,
        *,
        d_model: int = 256,
        ssm_size: int = 256,
        n_layers: int = 4,
        encoder_dim: int = 128,
        body_dim: int = 128,
        no_reset: bool = False,
        **stack: Any,
    ) -> None:
        super().__init__()
        for name, size in (("obs_dim", obs_dim), ("action_dim", action_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; expected 1 or more")
        self.obs_dim, self.action_dim, self.continuous, self.no_reset = obs_dim, action_dim, continuous, no_reset
        self.encoder = nn.ModuleList([Linear(obs_dim, encoder_dim), Linear(encoder_dim, d_model)])
        self.s5 = S5Stack(d_model, ssm_size, n_layers, **stack)
        self.actor = nn.ModuleList(
            [Linear(d_model, body_dim), Linear(body_dim, body_dim), Linear(body_dim, action_dim)]
        )
        self.critic = nn.ModuleList([Linear(d_model, body_dim), Linear(body_dim, body_dim), Linear(body_dim, 1)])
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if continuous else None
        gains = [(self.encoder, [math.sqrt(2)] * 2), (self.actor, [2, 2, 0.01]), (self.critic, [2, 2, 1.0])]
        for layers, each in gains:
            for layer, gain in zip(layers, each, strict=True):
                if layer.weight.device.type != "meta":  # no values to make orthogonal
                    nn.init.orthogonal_(layer.weight, gain)  # type: ignore[arg-type]
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def _encode(self, obs: Tensor) -> Tensor:
        for layer in self.encoder:
            obs = F.leaky_relu(layer(obs))
        return obs

    def _heads(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, layers in (("mean" if self.continuous else "logits", self.actor), ("value", self.critic)):
            y = F.leaky_relu(layers[1](F.leaky_relu(layers[0](x))))
            found[name] = layers[2](y)
        found["value"] = found["value"].squeeze(-1)
        if self.log_std is not None:
            # every step and row has the same; written out, so that the outputs' rows are the batch's
            found["std"] = torch.exp(self.log_std).expand_as(found["mean"])
        return found

    def forward(
        self,
        obs: Tensor,
        resets: Tensor | None = None,
        *,
        state: Memory | None = None,
        lengths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Whole trajectories at once, by one scan with resets.

        obs: (batch, steps, obs_dim); resets: (batch, steps), true where the observation is the first of an episode
        (what the environment called ``done`` one step before); state: from :meth:`init_state`, continued and left at
        the end; lengths: (batch,) steps that count, for ragged batches.

        Returns "logits" (batch, steps, actions), or "mean" and "std" of that shape if continuous, and "value" (batch,
        steps).
        """
        if obs.dim() != 3 or obs.shape[-1] != self.obs_dim:
            raise ValueError(f"obs has shape {tuple(obs.shape)}; expected (batch, steps, {self.obs_dim})")
        if resets is not None and resets.shape != obs.shape[:2]:
            raise ValueError(f"resets has shape {tuple(resets.shape)}; expected {tuple(obs.shape[:2])}, as obs has")
        if self.no_reset or resets is None:
            resets = None
        elif resets.dtype != torch.bool:
            resets = resets != 0
        return self._heads(self.s5(self._encode(obs), resets=resets, state=state, lengths=lengths))

    def init_state(self, batch: int) -> Memory:
        """Memory at rest for ``batch`` environments."""
        return self.s5.init_state(batch)

    def step(self, obs: Tensor, state: Memory, reset: Tensor | None = None) -> dict[str, Tensor]:
        """One step: obs (batch, obs_dim), reset (batch,); ``state`` moves on in place. As :meth:`forward`, without the
        axis of steps; its cost does not depend on how long an episode has lasted."""
        if obs.dim() != 2 or obs.shape[-1] != self.obs_dim:
            raise ValueError(f"obs has shape {tuple(obs.shape)}; expected (batch, {self.obs_dim})")
        reset = None if self.no_reset or reset is None else reset != 0
        return self._heads(self.s5.step(self._encode(obs), state, reset=reset))


class Unrolled:
    """:meth:`S5ActorCritic.step` with what depends on the weights alone computed once: for runs of many steps between
    which the weights do not change. No gradients; weights that change later are not seen."""

    @torch.no_grad()
    def __init__(self, model: S5ActorCritic) -> None:
        self.model = model
        self.layers = []
        for layer in model.s5.layers:
            seq = layer.seq
            A, B, C = seq.discrete()  # type: ignore[union-attr, operator]
            # real and imaginary parts side by side, as complex numbers lie in memory
            inward = torch.view_as_real(B).transpose(1, 2).flatten(0, 1).contiguous()
            outward = torch.view_as_real(C.conj().resolve_conj()).flatten(1).contiguous()
            self.layers.append((layer, A, inward, outward * 2 if seq.conj_sym else outward, seq.D))  # type: ignore[union-attr]

    @torch.no_grad()
    def step(self, obs: Tensor, state: Memory, reset: Tensor | None = None) -> dict[str, Tensor]:
        """As :meth:`S5ActorCritic.step`."""
        model = self.model
        x = model._encode(obs)
        for (layer, A, inward, outward, D), inside in zip(self.layers, state, strict=True):

            def mix(u: Tensor, A=A, inward=inward, outward=outward, D=D, s=inside["ssm"]) -> Tensor:
                if reset is not None and not model.no_reset:
                    s.masked_fill_((reset != 0)[:, None], 0)
                given = F.linear(u.to(inward.dtype), inward).unflatten(-1, (-1, 2))
                s.mul_(A).add_(torch.view_as_complex(given))
                y = F.linear(torch.view_as_real(s).flatten(-2), outward)
                return (y + D * u).to(u.dtype)

            x = layer._around(x, mix)  # type: ignore[union-attr, operator]
        return model._heads(x)


# -- the original's format --------------------------------------------------------------------------------------------

STACK_RULES = Rules(
    Rename("layers_{i:d}/norm/scale", "layers.{i:d}.norm.weight"),
    Rename("layers_{i:d}/{out}/kernel", "layers.{i:d}.{out}.weight", Transpose(0, 1)),
    Rename("layers_{i:d}/{part}/{p}", "layers.{i:d}.{part}.{p}"),
)


def _dense(theirs: str, ours: str) -> Rules:
    return Rules(
        Rename(f"{theirs}/kernel", f"{ours}.weight", Transpose(0, 1)), Rename(f"{theirs}/bias", f"{ours}.bias")
    )


RULES = STACK_RULES.nested("s5/", "s5.") + Rules(
    *(_dense(f"encoder_{i}", f"encoder.{i}") for i in range(2)),
    *(_dense(f"action_body_{i}", f"actor.{i}") for i in range(2)),
    *(_dense(f"value_body_{i}", f"critic.{i}") for i in range(2)),
    _dense("action_decoder", "actor.2"),
    _dense("value_decoder", "critic.2"),
)

STACK_KEYS = ("activation", "do_norm", "prenorm", "do_gtrxl_norm", "conj_sym", "clip_eigs", "C_init", "discretization",
              "dt_min", "dt_max")  # fmt: skip
#: The class's own; the original's script sets every one of them to something else.
STACK_DEFAULTS = {"activation": "gelu", "do_norm": True, "prenorm": True, "do_gtrxl_norm": True}
#: Of the original's script: how it trains.
TRAINING_KEYS = {
    *("lr", "num_envs", "num_steps", "total_timesteps", "update_epochs", "num_minibatches", "gamma", "gae_lambda"),
    *("clip_eps", "ent_coef", "vf_coef", "max_grad_norm", "anneal_lr", "debug", "log", "env_name"),
}
OTHER_KEYS = {"d_model", "ssm_size", "n_layers", "P", "blocks", "bidirectional", "step_rescale", "action_dim",
              "obs_dim", "continuous", "no_reset"}  # fmt: skip


def arguments_of(config: Mapping[str, Any], states: int | None = None, *, stack: bool = False) -> dict[str, Any]:
    """Our arguments from the original's, in its own spelling or its script's ("S5_D_MODEL"). ``states``: P, if known
    from the weights; ``stack``: of ``StackedEncoderModel`` alone, whose defaults are not the published run's. Raises
    ValueError for what is not built."""
    config = {k.lower().removeprefix("s5_"): v for k, v in config.items() if k.lower() not in TRAINING_KEYS}
    known = {k.lower(): k for k in (*STACK_KEYS, *OTHER_KEYS)}
    unknown = [k for k in config if k not in known]
    if unknown:
        raise ValueError(f"s5_rl has no configuration key {', '.join(map(repr, unknown))}; known: {sorted(known)}")
    config = {known[k]: v for k, v in config.items()}
    for key, only in (("blocks", 1), ("bidirectional", False), ("step_rescale", 1)):
        if config.get(key, only) != only:
            raise ValueError(f"s5_rl: {key} is {config[key]!r}; the original works with {only!r} alone")
    found: dict[str, Any] = STACK_DEFAULTS if stack else {}
    found = found | {k: config[k] for k in STACK_KEYS if k in config}
    states = states or config.get("P")
    size = config.get("ssm_size")
    if states is not None:
        size = 2 * states if config.get("conj_sym", True) else states
    found |= {"d_model": config["d_model"], "ssm_size": size, "n_layers": config["n_layers"]}
    return found | {k: config[k] for k in ("obs_dim", "action_dim", "continuous", "no_reset") if k in config}


class S5RLAdapter(ReferenceAdapter):
    """Reads luchris429/popjaxrl: the actor-critic, and its S5 stack by itself."""

    system = "s5_rl"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        agent = "encoder_0/kernel" in state
        first = ("s5/" if agent else "") + "layers_0/seq/Lambda_re"
        arguments = arguments_of(config, state[first].shape[0] if first in state else None, stack=not agent)
        if not agent:
            arguments = {k: v for k, v in arguments.items() if k in (*STACK_KEYS, "d_model", "ssm_size", "n_layers")}
            model: nn.Module = S5Stack(**arguments)
        else:
            arguments["continuous"] = bool(arguments.get("continuous", False)) or "log_std" in state
            arguments["obs_dim"], width = state["encoder_0/kernel"].shape
            arguments["action_dim"] = state["action_decoder/kernel"].shape[1]
            body = state["action_body_0/kernel"].shape[1]
            model = S5ActorCritic(**arguments, encoder_dim=width, body_dim=body)
        # some files hold large arrays in bfloat16
        return self.load(model, {k: v.float() for k, v in state.items()})

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        hidden = [inputs[k] for k in sorted((k for k in inputs if k.startswith("hidden")), key=lambda k: int(k[6:]))]
        pairs = bool(hidden) and not hidden[0].is_complex()  # full-size cards hold real and imaginary parts
        if pairs:
            hidden = [torch.view_as_complex(h.contiguous()) for h in hidden]

        def memory() -> Memory | None:
            return [{"ssm": h[0].clone()} for h in hidden] or None

        x = inputs["x" if isinstance(model, S5Stack) else "obs"].transpose(0, 1)
        resets = inputs.get("resets", inputs.get("dones"))
        if resets is not None:
            # "1.0 where the input value is < 0.1, else 0.0" on full-size cards, whose inputs are uniform draws
            drawn = resets.is_floating_point() and bool(((resets != 0) & (resets != 1)).any())
            resets = (resets < 0.1 if drawn else resets != 0).transpose(0, 1)
        state = memory() or model.init_state(x.shape[0])  # type: ignore[operator]
        if isinstance(model, S5Stack):
            found = {"y": model(x, resets=resets, state=state)}
            found["y_no_reset"] = model(x, state=memory())
            again = memory() or model.init_state(x.shape[0])
            marks = torch.zeros(x.shape[:2], dtype=torch.bool) if resets is None else resets
            with torch.no_grad():
                steps = [model.step(x[:, t], again, reset=marks[:, t]) for t in range(x.shape[1])]
            found["y_stepwise"] = torch.stack(steps, 1)
        else:
            found = dict(model(x, resets, state=state))
            if "std" in found:
                std = found["std"][0, 0]
                found |= {"loc": found["mean"], "actor_mean": found["mean"], "scale": std, "scale_diag": std}
                found["log_std"] = std.log()
        found = {k: v.transpose(0, 1) if v.dim() > 1 else v for k, v in found.items()}
        if "scale" in found:
            found["std"] = found["scale"]
        for i, layer in enumerate(state):
            final = layer["ssm"][None]
            found[f"hidden{i}"] = torch.view_as_real(final) if pairs else final
        return found | self._initialisation(model)

    def _initialisation(self, model: nn.Module) -> dict[str, Tensor]:
        """The eigenvalues and eigenvectors that a new model starts from, as the original orders them."""
        seq = (model if isinstance(model, S5Stack) else model.s5).layers[0].seq  # type: ignore[union-attr, index]
        if seq.ssm_size % 2:
            return {}
        W, V = (torch.from_numpy(a) for a in hippo.legs_normal_blocks(seq.ssm_size, 1))
        if not seq.conj_sym:  # all of them, in ascending order
            W, V = torch.cat([W, W.conj().flip(0)]), torch.cat([V, V.conj().flip(1)], 1)
        return {"mid/hippo_Lambda": W.to(torch.complex64), "mid/hippo_V": V.to(torch.complex64)}

    def replay(self, path, *, grad: bool = False, **options: Any) -> dict[str, Tensor]:
        """As every adapter's; eigenvectors, defined up to a factor of modulus 1 a column, take the file's factor."""
        from zoo.reference import read_golden

        found = super().replay(path, grad=grad, **options)
        wanted, ours = read_golden(path).mids.get("hippo_V"), found.get("mid/hippo_V")
        if wanted is not None and ours is not None and wanted.shape == ours.shape:
            factor = (ours.conj() * wanted).sum(0)
            found["mid/hippo_V"] = ours * (factor / factor.abs().clamp(min=1e-12))
        return found

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        agent = any(k.startswith(("encoder_0/", "encoder.")) for k in state)
        return RULES if agent else STACK_RULES


def reset_marks(dones: Tensor | Sequence[bool], first: bool = True) -> Tensor:
    """Resets from dones of the same rows, (steps,) or (batch, steps): an observation begins an episode where the step
    before ended one. ``first``: whether the very first observation does."""
    ended = torch.as_tensor(dones) != 0
    return F.pad(ended[..., :-1], (1, 0), value=first)
