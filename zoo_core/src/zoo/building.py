"""From a card to a module: checked arguments, meta-device build, strict filling with weights.

The loader builds on the meta device (no memory, no random numbers), assigns the tensors of a mapped file, and then
restores what a state dict does not carry: buffers that are not persistent, plain tensor attributes, ties.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo_registry import WeightsCard, errors

from .catalog import find, import_object
from .placement import checked_device, checked_dtype

if TYPE_CHECKING:
    from zoo_registry import ModelCard

logger = logging.getLogger("zoo")

#: What :mod:`zoo.adapting` says of a head that an argument replaced.
HEAD = re.compile(r"\((num_classes|n_class)=")


@dataclass
class ZooInfo:
    """What the zoo knows about a model that it built: ``model.zoo_info``."""

    architecture: str  #: name of the card, without a tag
    tag: str | None  #: tag of the weights, None for random or foreign ones
    config: dict[str, Any]  #: every argument that the builder was called with
    overrides: dict[str, Any] = field(default_factory=dict)  #: those that the caller gave
    source: str = "random weights"  #: where the weights came from, in words
    changes: list[str] = field(default_factory=list)  #: what was re-initialised or converted, one sentence each
    card: ModelCard | None = field(default=None, repr=False)
    weights: WeightsCard | None = field(default=None, repr=False)
    folder_config: dict[str, Any] = field(default_factory=dict, repr=False)  #: config.json, for saved folders
    folder: Path | None = field(default=None, repr=False)  #: where the weights lie, for saved and downloaded folders
    access: dict[str, Any] = field(default_factory=dict, repr=False)  #: cache_dir and local_files_only of the loading
    num_classes: int | None = field(default=None, repr=False)  #: of the model when this was attached to it

    @property
    def name(self) -> str:
        return self.architecture if self.tag is None else f"{self.architecture}.{self.tag}"


def create(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model with random weights, in training mode.

    ``name``: "architecture" or "architecture.tag" (the tag's own configuration applies, its weights do not).
    ``overrides``: any argument of the model's builder (``num_classes=10``); an unknown one raises
    ``zoo.errors.BadArgument`` naming the nearest. ``device="meta"`` builds without memory, for counting.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    card, weights = find(name)
    config = {**card.config, **(weights.config if weights is not None and "." in name else {}), **overrides}
    model = construct(card, config, device=device)
    model = model.to(device=device, dtype=dtype)
    describe(model, ZooInfo(card.name, None, config, dict(overrides), card=card))
    return model


def describe(model: nn.Module, info: ZooInfo) -> None:
    """Attach ``info`` as ``model.zoo_info`` (a plain attribute: it enters no state dict)."""
    info.num_classes = getattr(model, "num_classes", None)
    object.__setattr__(model, "zoo_info", info)


def trained(
    model: nn.Module, where: str, preprocess: Mapping[str, Any] | None = None, labels: Sequence[str] | None = None
) -> None:
    """Say in ``model.zoo_info`` that it has weights of its own now, so that pipelines answer as they will with the
    folder that ``zoo.save`` writes of it.

    where: what it was trained on. preprocess: how its inputs are prepared (None: as before). labels: of its classes
    (None: those of before do not hold any more). The licence of the weights that it began with goes on, and so do
    their companions which ``preprocess`` names.
    """
    before = model.zoo_info
    assert isinstance(before, ZooInfo)
    old = before.weights
    settings = dict(old.preprocess if preprocess is None and old is not None else preprocess or {})
    weights = WeightsCard(
        tag="own",
        where=f"trained on {where}",
        licence=None if old is None else old.licence,
        preprocess={k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
        companions={k: v for k, v in (old.companions if old is not None else {}).items() if k in settings.values()},
    )
    own = {} if labels is None else {"labels": list(labels)}
    source = f"trained on {where}"
    describe(
        model, replace(before, tag=None, source=source, changes=[], weights=weights, folder_config=own, folder=None)
    )


def has_new_head(model: nn.Module) -> bool:
    """Whether the weights' head was replaced, on loading (``num_classes=``) or by ``reset_classifier`` with another
    number of classes: names of classes and figures are not the model's own then."""
    info = model.zoo_info
    assert isinstance(info, ZooInfo)
    return getattr(model, "num_classes", None) != info.num_classes or any(
        HEAD.search(change) for change in info.changes
    )


def construct(card: ModelCard, config: Mapping[str, Any], *, device: torch.device | str | None = None) -> nn.Module:
    """Call the card's builder under ``torch.device(device)``, with its arguments checked first."""
    builder = import_object(card.builder)
    check_arguments(card.name, builder, config)
    with contextlib.nullcontext() if device is None else torch.device(device):
        try:
            return builder(**config)
        except TypeError as error:  # behind **kwargs the class itself finds out
            unknown = re.search(r"(\S+) got an unexpected keyword argument '(\w+)'", str(error))
            if unknown is not None and unknown[2] in config:
                raise _unknown_argument(card.name, unknown[2], config, builder) from error
            if (wrong := wrong_type(builder, config)) is not None:
                raise errors.BadArgument(f"{card.name}: {wrong[1]}", argument=wrong[0], accepted=[]) from error
            raise


def check_arguments(name: str, builder: Any, config: Mapping[str, Any]) -> None:
    """Raise BadArgument for an argument that the builder's signature (or, behind ``**kwargs``, nothing) rules out."""
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):  # builtins and C callables have no signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in config:
        if key not in parameters:
            raise _unknown_argument(name, key, config, builder)


#: what an annotation of this name takes
_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (numbers.Integral,),
    "float": (numbers.Real,),
    "bool": (bool, numbers.Integral),
    "str": (str, os.PathLike),
    "None": (type(None),),
}


def wrong_type(function: Any, given: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first of ``given`` that fits none of the types of its annotation, and a sentence about it; None: all fit.

    Only annotations of plain types (int, float, bool, str, None) are judged: those that a command line gets wrong.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins and C callables have no signature
        return None
    for key, parameter in parameters.items():
        annotation = parameter.annotation
        text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        kinds = [part.strip() for part in text.split("|")]
        if key not in given or any(kind not in _PLAIN for kind in kinds):
            continue
        value = given[key]
        fits = isinstance(value, tuple(kind for name in kinds for kind in _PLAIN[name]))
        if not fits or (isinstance(value, bool) and "bool" not in kinds):
            return key, f"{key} is {value!r:.80}; expected {' or '.join(kinds)}"
    return None


def _unknown_argument(name: str, key: str, config: Mapping[str, Any], builder: Any) -> errors.BadArgument:
    named = (p.name for p in inspect.signature(builder).parameters.values() if p.kind is not p.VAR_KEYWORD)
    accepted = [k for k in dict.fromkeys([*named, *config]) if k not in ("self", "cls", key)]
    near = get_close_matches(key, accepted, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"among those it has: {', '.join(accepted)}"
    return errors.BadArgument(
        f"{name} has no argument {key!r} (received {key}={config[key]!r}); {hint}", argument=key, accepted=accepted
    )


# -- building without memory -----------------------------------------------------------------------------------------


def skeleton(card: ModelCard, config: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device; :func:`restore_derived` later makes the tensors that no state dict carries."""
    try:
        return construct(card, config, device="meta")
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        logger.info(
            "%s cannot be built on the meta device (%s); built without initialisation instead", card.name, error
        )
        return uninitialised(card, config)


def uninitialised(card: ModelCard, config: Mapping[str, Any]) -> nn.Module:
    """The model on the CPU with unset parameters but every derived buffer computed.

    Allocated memory that nobody writes costs nothing, so random initialisation is skipped, all else runs.
    """
    with _SkipRandom():
        return construct(card, config)


class _SkipRandom(TorchFunctionMode):
    """In-place writes to parameters and random fills do nothing: a checkpoint is about to replace what they write."""

    _RANDOM = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_"})
    _KEEP = frozenset({"requires_grad_"})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        target = args[0] if args else (kwargs or {}).get("tensor")  # torch.nn.init passes it by keyword
        in_place = name.endswith("_") and not name.endswith("__") and isinstance(target, Tensor)
        if in_place and (name in self._RANDOM or (isinstance(target, nn.Parameter) and name not in self._KEEP)):
            return target
        return function(*args, **(kwargs or {}))


# -- filling with weights --------------------------------------------------------------------------------------------


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names that share one parameter, several to a group; the first is the one that files keep."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        names.setdefault(id(buffer), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    what: str = "the given state dict",
    explained: Mapping[str, str] | None = None,
) -> nn.Module:
    """Assign ``state`` to ``model`` without a copy. Strict: all keys and shapes are compared before anything changes.

    Ties: one name of a tied group is enough; if several are given they must hold the same values. Raises
    ``zoo.errors.KeysDoNotMatch``; ``explained`` maps a key to the caller's option that accounts for it.
    """
    own = model.state_dict(keep_vars=True)
    full = dict(state)
    for key in own:
        # Batch norm's step counters change no output, and older or converted files leave them out.
        if key.endswith(".num_batches_tracked") and key not in full:
            full[key] = torch.zeros((), dtype=torch.long)
    groups = tied_groups(model)
    for group in groups:
        _share(full, [name for name in group if name in own or name in full], what)
    missing = [key for key in own if key not in full]
    unexpected = [key for key in full if key not in own]
    mismatched = {
        key: (tuple(full[key].shape), tuple(own[key].shape))
        for key in own
        if key in full and isinstance(own[key], Tensor) and full[key].shape != own[key].shape
    }
    if missing or unexpected or mismatched:
        raise errors.KeysDoNotMatch.between(
            what, missing=missing, unexpected=unexpected, mismatched=mismatched, explained=explained
        )
    for key, tensor in full.items():
        _assign(model, key, tensor, own[key])
    for group in groups:
        _tie(model, group)
    return model


def _share(state: dict[str, Tensor], group: list[str], what: str) -> None:
    present = [name for name in group if name in state]
    if not present:
        return
    first = state[present[0]]
    for name in present[1:]:
        other = state[name]
        same = other is first or (other.data_ptr() == first.data_ptr() and other.shape == first.shape)
        if not same and not (other.shape == first.shape and torch.equal(other, first)):
            raise errors.BadCheckpoint(
                f"{what}: {name} and {present[0]} are one tensor in this model but differ in the file"
            )
    for name in group:
        state[name] = first


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, leaf = key.rpartition(".")
    return (model.get_submodule(path) if path else model), leaf


def _assign(model: nn.Module, key: str, tensor: Any, own: Any) -> None:
    owner, leaf = _owner(model, key)
    if leaf in owner._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=own.requires_grad)
        owner._parameters[leaf] = tensor
    elif leaf in owner._buffers:
        owner._buffers[leaf] = tensor.detach()
    else:  # extra state of a module that defines get_extra_state
        owner.set_extra_state(tensor)


def _tie(model: nn.Module, group: list[str]) -> None:
    owner, leaf = _owner(model, group[0])
    store = "_parameters" if leaf in owner._parameters else "_buffers"
    shared = getattr(owner, store)[leaf]
    for name in group[1:]:
        other, other_leaf = _owner(model, name)
        getattr(other, store)[other_leaf] = shared


# -- what a state dict does not carry --------------------------------------------------------------------------------


def left_on_meta(model: nn.Module) -> list[str]:
    """Parameters, buffers and plain tensor attributes that are still without memory, by dotted name."""
    found = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    found += [name for name, tensor in model.named_buffers() if tensor.is_meta]
    for prefix, module in model.named_modules():
        for name, value in _plain_tensors(module):
            if value.is_meta:
                found.append(f"{prefix}.{name}" if prefix else name)
    return found


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((name, item) for item in value if isinstance(item, Tensor))
        elif isinstance(value, dict):
            yield from ((name, item) for item in value.values() if isinstance(item, Tensor))


def restore_derived(model: nn.Module, card: ModelCard, config: Mapping[str, Any]) -> None:
    """Give memory to everything that is still on the meta device after :func:`fill`.

    A module that has ``init_non_persistent_buffers()`` (timm's name for it) computes its own; the rest is taken from
    a second build on the CPU without initialisation, so that whatever ``__init__`` computes comes out the same.
    """
    names = left_on_meta(model)
    if not names:
        return
    for module in model.modules():
        own = [b for b in module._buffers.values() if b is not None and b.is_meta]
        if own and callable(getattr(module, "init_non_persistent_buffers", None)):
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
            module.init_non_persistent_buffers()
    names = left_on_meta(model)
    if not names:
        return
    real = uninitialised(card, config)
    for name in names:
        owner, leaf = _owner(model, name)
        source, _ = _owner(real, name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = source._buffers[leaf]
        elif leaf in owner._parameters:
            owner._parameters[leaf] = source._parameters[leaf]
        else:
            setattr(owner, leaf, getattr(source, leaf))
