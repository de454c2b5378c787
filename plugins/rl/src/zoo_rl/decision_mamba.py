"""Decision Mamba: a return-conditioned policy of two scans a block, one over tokens, one over (return, state, action).

Paper: Lv et al., "Decision Mamba: A Multi-Grained State Space Model with Self-Evolution Regularization for Offline RL",
arXiv 2406.05427. Original: aopolin-lv/DecisionMamba @ d37dc82, MIT (``models/decision_transformer.py`` and the changed
``modeling_mamba.py``). Differs from the original: any width (its convolution over triplets is fixed at 768 channels),
and a causal form (``fine="causal"``) that a running agent can hold as a state of fixed size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Mamba, Recomputed, RMSNorm
from zoo.layers.linear import Linear
from zoo.reference import ReferenceAdapter
from zoo.rules import Drop, Rename, Rules

State = dict[str, Any]
TOKENS = 3  #: of a step: return-to-go, state, action


class ResidualEmbedding(nn.Module):
    """``h = fc1(x)``, then ``h + fc2(gelu(h))``: (..., dim_in) to (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(dim_in, dim_out), Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return h + self.fc2(F.gelu(h))


class MlpHead(nn.Module):
    """``fc2(gelu(fc1(x)))``, unbounded: (..., dim_in) to (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(dim_in, dim_in), Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(Recomputed):
    """``x + coarse + fine`` over 3 K tokens, with n = RMSNorm(x).

    coarse: a Mamba over all tokens of n. fine: every triplet of tokens folded into one by a convolution of width and
    stride 3, a Mamba over these K vectors g, a LayerNorm. ``fine`` says to which tokens g returns:

    "tiled" (the original): position p gets ``g[p mod K]``. Features do not return to their own triplets, and later
    steps reach earlier predictions; the last action, which is not known yet, is made zero beforehand.

    "causal" (this project's): the three tokens of step k get ``g[k - 1]``, the features of all whole steps before it.
    """

    def __init__(self, dim: int, d_state: int, d_conv: int, expand: float, dt_rank: int | str, eps: float, fine: str,
                 conv_bias: bool, bias: bool) -> None:  # fmt: skip
        super().__init__()
        self.fine = fine
        self.norm = RMSNorm(dim, eps)
        mixer = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        self.mixer = Mamba(dim, **mixer, conv_bias=conv_bias, bias=bias)  # type: ignore[arg-type]
        self.group_conv = nn.Conv1d(dim, dim, TOKENS, stride=TOKENS)
        self.group_mixer = Mamba(dim, **mixer, conv_bias=conv_bias, bias=bias)  # type: ignore[arg-type]
        self.group_norm = nn.LayerNorm(dim)

    def groups(self, n: Tensor) -> Tensor:
        """The triplets as single vectors: (batch, 3 K, dim) to (batch, K, dim)."""
        # A convolution whose stride is its width is one product over the triplet's numbers.
        weight = self.group_conv.weight.permute(0, 2, 1).flatten(1)
        return F.linear(n.reshape(n.shape[0], -1, TOKENS * n.shape[-1]), weight, self.group_conv.bias)

    def forward(self, x: Tensor, found: dict[str, Tensor] | None = None) -> Tensor:
        """(batch, 3 K, dim) to the same. ``found`` is given what lies between, for comparisons."""
        n = self.norm(x)
        coarse = self.mixer(n)
        if self.fine == "tiled":
            n = torch.cat([n[:, :-1], torch.zeros_like(n[:, :1])], 1)
        g = self.groups(n)
        mixed = self.group_mixer(g)
        if found is not None:
            found |= {"in": x, "group_in": g, "group_out": mixed}
        features = self.group_norm(mixed)
        if self.fine == "tiled":
            features = features.repeat(1, TOKENS, 1)
        else:
            features = F.pad(features, (0, 0, 1, -1)).repeat_interleave(TOKENS, dim=1)
        return x + coarse + features

    # -- one step at a time, in the causal form

    def init_state(self, batch: int) -> State:
        like = self.group_norm.weight
        return {
            "mixer": self.mixer.init_state(batch),
            "group": self.group_mixer.init_state(batch),
            "features": like.new_zeros(batch, like.shape[0]),
        }

    def step(self, x: Tensor, state: State) -> Tensor:
        """Some tokens of one step, (batch, count, dim), whose features are those of the steps before."""
        n = self.norm(x)
        coarse = torch.stack([self.mixer.step(n[:, i], state["mixer"]) for i in range(n.shape[1])], 1)
        state["seen"] = torch.cat([state["seen"], n], 1) if "seen" in state else n
        if state["seen"].shape[1] == TOKENS:  # the step is whole: its features serve the next one
            g = self.groups(state.pop("seen"))[:, 0]
            out = x + coarse + state["features"][:, None]
            state["features"] = self.group_norm(self.group_mixer.step(g, state["group"]))
            return out
        return x + coarse + state["features"][:, None]


class DecisionMamba(GradCheckpointing, nn.Module):
    """From returns-to-go, states and actions of K steps to the action of every step.

    Arguments: ``state_dim`` S, ``act_dim`` A, ``hidden_size`` D, ``num_layers``, ``max_length`` (the window K of
    training and of :meth:`get_action`; None: no window), ``max_ep_len`` (timesteps that have an embedding),
    ``d_state``, ``d_conv``, ``expand``, ``dt_rank``, ``norm_eps``, ``conv_bias``, ``bias`` (of the mixers),
    ``mlp_embedding`` (residual embeddings and an unbounded MLP head; else one linear map each), ``action_tanh`` (bounds
    the linear head), ``predict_sr`` (also predict the next state and return-to-go), ``share_input_output_proj`` (linear
    heads are the transposed embeddings; the action's has a tanh), ``fine`` (see :class:`Block`), ``vocab_size`` (rows
    of the original's unused token embedding; 0: left out).
    """

    def __init__(
        self,
        state_dim: int,
        act_dim: int,
        hidden_size: int = 768,
        num_layers: int = 24,
        max_length: int | None = 20,
        max_ep_len: int = 4096,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        norm_eps: float = 1e-5,
        conv_bias: bool = True,
        bias: bool = False,
        mlp_embedding: bool = True,
        action_tanh: bool = True,
        predict_sr: bool = True,
        share_input_output_proj: bool = False,
        fine: str = "tiled",
        vocab_size: int = 0,
    ) -> None:
        super().__init__()
        if fine not in ("tiled", "causal"):
            raise ValueError(f"fine is {fine!r}; expected 'tiled' (the original) or 'causal'")
        if mlp_embedding and share_input_output_proj:
            raise ValueError(
                "share_input_output_proj and mlp_embedding are both set; only linear embeddings can be heads as well"
            )
        sizes = {"state_dim": state_dim, "act_dim": act_dim, "hidden_size": hidden_size, "max_length": max_length}
        for name, size in (sizes | {"max_ep_len": max_ep_len}).items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; expected 1 or more")
        self.state_dim, self.act_dim, self.hidden_size = state_dim, act_dim, hidden_size
        self.max_length, self.max_ep_len, self.predict_sr, self.fine = max_length, max_ep_len, predict_sr, fine
        self.embed_timestep = nn.Embedding(max_ep_len, hidden_size)
        embed = ResidualEmbedding if mlp_embedding else Linear
        self.embed_return, self.embed_state = embed(1, hidden_size), embed(state_dim, hidden_size)
        self.embed_action = embed(act_dim, hidden_size)
        self.embed_ln = nn.LayerNorm(hidden_size)
        self.token_embedding = nn.Embedding(vocab_size, hidden_size) if vocab_size else None
        self.layers = nn.ModuleList(
            Block(hidden_size, d_state, d_conv, expand, dt_rank, norm_eps, fine, conv_bias, bias)
            for _ in range(num_layers)
        )
        self.norm_f = RMSNorm(hidden_size, norm_eps)
        self.tied_heads = share_input_output_proj
        self.tanh = share_input_output_proj or (action_tanh and not mlp_embedding)
        if not share_input_output_proj:
            head = MlpHead if mlp_embedding else Linear
            self.predict_state, self.predict_rtg = Linear(hidden_size, state_dim), Linear(hidden_size, 1)
            self.predict_action = head(hidden_size, act_dim)
        unused = () if predict_sr or share_input_output_proj else ("predict_state", "predict_rtg")
        self.unused_parameters = (*unused, *(("token_embedding",) if vocab_size else ()))
        if self.token_embedding is not None:
            nn.init.normal_(self.token_embedding.weight, std=0.1)

    # -- parts

    def embed(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, timesteps: Tensor) -> Tensor:
        """The tokens (batch, 3 K, D), in the order return, state, action of each step."""
        tokens = [self.embed_return(returns_to_go), self.embed_state(states), self.embed_action(actions)]
        return self._placed(torch.stack(tokens, 2), timesteps)

    def _placed(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """(batch, K, count, D) normalised, with the timestep's embedding added afterwards; flat along time."""
        return (self.embed_ln(tokens) + self.embed_timestep(timesteps)[:, :, None]).flatten(1, 2)

    def actions_from(self, x: Tensor) -> Tensor:
        """The actions that follow from the outputs at the states' tokens."""
        y = F.linear(x, self.embed_action.weight.t()) if self.tied_heads else self.predict_action(x)  # type: ignore[union-attr, arg-type]
        return torch.tanh(y) if self.tanh else y

    def heads(self, hidden: Tensor) -> dict[str, Tensor]:
        """Predictions from the backbone's output (batch, 3 K, D)."""
        x = hidden.unflatten(1, (-1, TOKENS))
        found = {"actions": self.actions_from(x[:, :, 1])}
        if self.predict_sr:
            last = x[:, :, 2]
            if self.tied_heads:
                found["states"] = F.linear(last, self.embed_state.weight.t())  # type: ignore[union-attr, arg-type]
                found["returns_to_go"] = F.linear(last, self.embed_return.weight.t())  # type: ignore[union-attr, arg-type]
            else:
                found |= {"states": self.predict_state(last), "returns_to_go": self.predict_rtg(last)}
        return found

    def hidden(
        self, states: Tensor, actions: Tensor, returns_to_go: Tensor, timesteps: Tensor,
        found: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The backbone's output (batch, 3 K, D)."""
        x = self.embed(states, actions, returns_to_go, timesteps)
        for i, layer in enumerate(self.layers):
            inside: dict[str, Tensor] | None = None if found is None else {}
            x = layer(x, inside)
            if found is not None and inside is not None:
                found |= {f"block{i}_{name}": value for name, value in inside.items()} | {f"block{i}": x}
        return self.norm_f(x)

    @torch.no_grad()
    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Begin from a pre-trained Mamba language model in transformers' keys ("backbone.layers.0.norm.weight"), as
        the original does with ``from_scratch`` unset: each block's mixer fills both of ours, norms follow.

        Raises ValueError that names what is missing or of another shape, and changes nothing then.
        """
        taken: dict[str, Tensor] = {}
        for key, tensor in self.state_dict().items():
            theirs = f"backbone.{key.replace('group_mixer', 'mixer')}"
            if not re.match(r"(layers\.\d+\.(norm|mixer|group_mixer)|norm_f)\.", key):
                continue
            if theirs not in state:
                raise ValueError(f"the language model has no {theirs!r}; expected a Mamba of {len(self.layers)} layers")
            if state[theirs].shape != tensor.shape:
                raise ValueError(f"{theirs} has shape {tuple(state[theirs].shape)}; expected {tuple(tensor.shape)}")
            taken[key] = state[theirs]
        self.load_state_dict({**self.state_dict(), **taken})

    # -- whole

    def forward(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """Predictions for every step of a window.

        states: (batch, K, S), normalised by the data set's mean and deviation; actions: (batch, K, A); returns_to_go:
        (batch, K, 1), divided by the data set's scale; timesteps: (batch, K) integers below ``max_ep_len``.

        Returns "actions" (batch, K, A) and, with ``predict_sr``, "states" (batch, K, S) and "returns_to_go" (batch, K,
        1) of the next step. There is no mask: what pads a window's beginning enters the state, as in the original.
        """
        self.check(states, actions, returns_to_go, timesteps)
        return self.heads(self.hidden(states, actions, returns_to_go, timesteps))

    def check(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, timesteps: Tensor) -> None:
        """Raise ValueError unless the shapes fit together and to the model."""
        if states.dim() != 3:
            raise ValueError(f"states has shape {tuple(states.shape)}; expected (batch, steps, {self.state_dim})")
        rows = tuple(states.shape[:2])
        for name, tensor, wanted in (
            ("states", states, (*rows, self.state_dim)),
            ("actions", actions, (*rows, self.act_dim)),
            ("returns_to_go", returns_to_go, (*rows, 1)),
            ("timesteps", timesteps, rows),
        ):
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted}")

    def get_action(self, states: Tensor, actions: Tensor, returns_to_go: Tensor, timesteps: Tensor) -> Tensor:
        """The action of the last step: (batch, steps, ...) as in :meth:`forward` to (batch, A).

        Reads the last ``max_length`` steps, padded on the left with zeros to that length, as the model was trained.
        """
        self.check(states, actions, returns_to_go, timesteps)
        window = [states, actions, returns_to_go, timesteps]
        if self.max_length is not None:
            window = [x[:, -self.max_length :] for x in window]
            pad = self.max_length - window[0].shape[1]
            window = [F.pad(x, (0, 0) * (x.dim() - 2) + (pad, 0)) for x in window]
        x = self.hidden(*window)
        return self.actions_from(x[:, -2])

    # -- as a state of fixed size, in the causal form

    def init_agent(self, batch: int) -> State:
        """The state before the first step. Raises ValueError for the tiled form, which has no such state."""
        if self.fine != "causal":
            raise ValueError("fine='tiled' lets later steps reach earlier ones and has no state; use get_action")
        return {"layers": [layer.init_state(batch) for layer in self.layers]}  # type: ignore[union-attr, operator]

    def decide(self, state: State, observation: Tensor, return_to_go: Tensor, timestep: Tensor) -> Tensor:
        """The action (batch, A) for observation (batch, S), return_to_go (batch, 1), timestep (batch,); ``state`` moves
        on in place. Follow it with :meth:`record`."""
        tokens = torch.stack([self.embed_return(return_to_go), self.embed_state(observation)], 1)
        return self.actions_from(self._advance(state, tokens, timestep)[:, 1])

    def record(self, state: State, action: Tensor, timestep: Tensor) -> None:
        """Tell the state which action (batch, A) was taken."""
        self._advance(state, self.embed_action(action)[:, None], timestep)

    def _advance(self, state: State, tokens: Tensor, timestep: Tensor) -> Tensor:
        x = self._placed(tokens[:, None], timestep[:, None])
        for layer, inside in zip(self.layers, state["layers"], strict=True):
            x = layer.step(x, inside)  # type: ignore[union-attr, operator]
        return self.norm_f(x)


# -- the original's format --------------------------------------------------------------------------------------------

TOKEN_EMBEDDING = "transformer_model.backbone.embeddings.weight"
RULES = Rules(
    # The language model's head has no use here; the original ties it to its token embedding.
    Drop("transformer_model.lm_head.weight", once=TOKEN_EMBEDDING, restore=lambda state, _: state[TOKEN_EMBEDDING]),
    Rename(TOKEN_EMBEDDING, "token_embedding.weight"),
    Rename("transformer_model.backbone.norm_f.{p}", "norm_f.{p}"),
    Rename("transformer_model.backbone.layers.{i:d}.mixer_group.{p:*}", "layers.{i:d}.group_mixer.{p:*}"),
    Rename("transformer_model.backbone.layers.{i:d}.conv1d.{p}", "layers.{i:d}.group_conv.{p}"),
    Rename("transformer_model.backbone.layers.{i:d}.ln_norm.{p}", "layers.{i:d}.group_norm.{p}"),
    Rename("transformer_model.backbone.layers.{i:d}.{p:*}", "layers.{i:d}.{p:*}"),
)
LINEAR_HEAD = Rules(Rename("predict_action.0.{p}", "predict_action.{p}"))

#: The original's keys and ours: of the backbone's configuration, and of the policy's.
BACKBONE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "state_size": "d_state",
    "num_hidden_layers": "num_layers",
    "layer_norm_epsilon": "norm_eps",
    "expand": "expand",
    "conv_kernel": "d_conv",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "time_step_rank": "dt_rank",
}
POLICY = ("state_dim", "act_dim", "max_length", "max_ep_len", "action_tanh", "predict_sr")
#: Keys that change no number here: training, initialisation, caching, and copies of others in mamba_ssm's spelling.
WITHOUT_EFFECT = frozenset(
    {
        *("residual_in_fp32", "rescale_prenorm_residual", "use_cache", "initializer_range", "resid_pdrop", "pskd"),
        *("alpha_T", "hidden_size", "time_step_scale", "time_step_min", "time_step_max", "time_step_floor"),
        *("time_step_init_scheme", "intermediate_size", "model_type", "torch_dtype", "transformers_version"),
        *("architectures", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "d_inner", "d_model"),
        *("n_layer", "fused_add_norm", "rms_norm", "pad_vocab_size_multiple", "ssm_cfg", "tie_word_embeddings"),
        *("n_head", "n_inner", "activation_function", "n_positions", "attn_pdrop", "fp16"),
    }
)


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments from ``{"mamba": the backbone's configuration, "args": the script's, and the constructor's}``."""
    mamba, args = dict(config.get("mamba") or {}), dict(config.get("args") or {})
    own = {k: v for k, v in config.items() if k not in ("mamba", "args", "mlp_embedding", "share_input_output_proj")}
    if args.get("lora"):
        raise ValueError("decision_mamba: lora is set; adapters of low rank are not built here: merge them first")
    if args.get("extend_positions"):
        raise ValueError("decision_mamba: extend_positions is set; it extends GPT-2's positions, which Mamba lacks")
    if mamba.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"decision_mamba: hidden_act is {mamba['hidden_act']!r}; expected 'silu'")
    if mamba.get("time_step_rank") == "auto":
        mamba["time_step_rank"] = -(-int(mamba["hidden_size"]) // 16)
    known = {*BACKBONE, *WITHOUT_EFFECT, "hidden_act"}
    unknown = [k for k in mamba if k not in known] + [k for k in own if k not in {*POLICY, *WITHOUT_EFFECT}]
    if unknown:
        raise ValueError(f"decision_mamba has no configuration key {', '.join(map(repr, unknown))}")
    found = {ours: mamba[theirs] for theirs, ours in BACKBONE.items() if theirs in mamba}
    found |= {name: own[name] for name in POLICY if name in own}
    # Where the configuration is silent the original's defaults hold, which are not this model's.
    silent: dict[str, Any] = {"predict_sr": False, "max_length": None}
    if mamba:
        silent |= {"vocab_size": 50280, "hidden_size": 768, "num_layers": 32}  # transformers' Mamba
    found = silent | found
    for name in ("mlp_embedding", "share_input_output_proj"):
        found[name] = bool(args.get(name, config.get(name, False)))
    return found


class DecisionMambaAdapter(ReferenceAdapter):
    """Reads aopolin-lv/DecisionMamba."""

    system = "decision_mamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(DecisionMamba(**arguments_of(config)), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return arguments_of(config)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, DecisionMamba)
        window = [inputs[name] for name in ("states", "actions", "returns_to_go", "timesteps")]
        states, actions, returns_to_go, timesteps = window
        model.check(states, actions, returns_to_go, timesteps)
        between: dict[str, Tensor] = {}
        hidden = model.hidden(states, actions, returns_to_go, timesteps, between)
        found = {("rtg" if k == "returns_to_go" else k): v for k, v in model.heads(hidden).items()}
        found |= {"last_hidden_state": hidden, "loss": found["actions"].pow(2).mean()}
        # "get_action on the first 3 steps of batch element 0"
        said = re.search(r"first (\d+) steps", str(call))
        steps = min(int(said.group(1)) if said else window[0].shape[1], window[0].shape[1])
        found["get_action"] = model.get_action(*[x[:1, :steps] for x in window])[0]
        return found | {f"mid/{name}": value for name, value in between.items()}

    def loss(self, golden, named):
        return named["out/actions"].float().pow(2).mean()

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        linear = any(k.startswith("predict_action.0.") for k in state) or (
            isinstance(model, DecisionMamba) and not model.tied_heads and isinstance(model.predict_action, nn.Linear)
        )
        return LINEAR_HEAD + RULES if linear else RULES
