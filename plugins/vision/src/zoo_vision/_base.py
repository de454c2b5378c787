"""What every backbone of this plugin has in common: the habits that users of timm expect.

:class:`VisionModel` is the base of our own models, :class:`Habits` goes before timm's own classes, so that all of them
answer the same calls: ``forward_features``, ``forward_head``, ``forward_intermediates``, ``features_only`` pyramids,
``reset_classifier``, ``get_classifier``, ``set_grad_checkpointing``, ``group_matcher``, ``no_weight_decay`` and
``default_cfg``. :func:`build` is what the cards' builders call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any, ClassVar, Self, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._features import FeatureInfo, feature_take_indices
from torch import Tensor, nn

from zoo import building, catalog
from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing

from .timm_models import register_timm

Indices = int | Sequence[int] | None


class Habits:
    """What can be mixed in before any image model that has timm's ``forward_intermediates``: pyramids, and facts.

    ``first_conv`` and ``classifier`` name the modules whose shapes follow ``in_chans`` and ``num_classes``.
    """

    first_conv: ClassVar[str | tuple[str, ...]] = "patch_embed.proj"
    classifier: ClassVar[str | tuple[str, ...]] = "head"
    #: set by :meth:`as_pyramid`: ``forward`` returns the list of maps at these indices
    out_indices: list[int] | None = None
    #: keys of the whole model that a pyramid does not have; a loader may find them in a checkpoint and leave them out
    dropped_keys: frozenset[str] = frozenset()

    @property
    def ends(self) -> dict[str, Any]:
        """What ``num_classes=`` and ``in_chans=`` change, for the loader (see ``zoo.adapting``)."""
        first = [f"{name}.weight" for name in _names(self.first_conv)]
        return {"num_classes": NewHead(*_names(self.classifier)), "in_chans": InputChannels(*first)}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the weights: from the zoo's cards where the zoo loaded them, else what is known."""
        given = self.__dict__.get("_pretrained_cfg")
        return dict(given) if given is not None else timm_cfg(self)

    @pretrained_cfg.setter
    def pretrained_cfg(self, value: Any) -> None:
        self.__dict__["_pretrained_cfg"] = value if value is None or isinstance(value, dict) else value.to_dict()

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, value: Any) -> None:
        self.pretrained_cfg = value

    def forward(self, x: Tensor) -> Any:
        if self.out_indices is not None:
            return self.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)  # type: ignore[attr-defined]
        return super().forward(x)  # type: ignore[misc]

    def as_pyramid(self, out_indices: Indices = None) -> Self:
        """Turn this model into a feature pyramid, in place: ``forward`` then returns a list of maps.

        Keys of the state dict keep their names; those of removed parts are in ``dropped_keys``. ``feature_info``
        becomes timm's ``FeatureInfo`` (``.channels()``, ``.reduction()``).
        """
        model: Any = self
        before = set(model.state_dict())
        wanted = check_indices(out_indices, len(model.feature_info))
        info = list(model.feature_info)
        take = list(model.prune_intermediate_layers(wanted, prune_norm=True))
        model.feature_info = FeatureInfo(info, out_indices=tuple(take))
        self.out_indices = take
        self.dropped_keys = frozenset(before - set(model.state_dict()))
        return self


class TrainingHabits(GradCheckpointing, Habits):
    """What recipes ask of our own models (timm's classes answer for themselves)."""

    def no_weight_decay(self) -> set[str]:
        """Parameters that recipes leave out of weight decay: position tables, class tokens, A and D of every scan."""
        ends = ("A_log", "A_b_log", ".D", "dt_bias", "pos_embed", "cls_token", "cls_token_head", "cls_token_tail")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}  # type: ignore[attr-defined]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        stages = "(?:blocks|layers|levels|stages)"
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": rf"^{stages}\.(\d+)"
            if coarse
            else [
                (rf"^{stages}\.(\d+)\.blocks\.(\d+)", None),
                (rf"^{stages}\.(\d+)\.downsample", (99999,)),
                (rf"^{stages}\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }


class VisionModel(TrainingHabits, nn.Module):
    """Common habits. A subclass sets, in its ``__init__``:

    * ``num_classes``, ``in_chans``, ``num_features`` (width of the pooled features);
    * ``feature_info``: one ``{"num_chs": C, "reduction": stride, "module": name}`` for each map it can return;
    * ``self.head``, an ``nn.Linear`` (or Identity for ``num_classes=0``), unless it overrides the two classifier calls;

    and implements :meth:`forward_stages`, :meth:`forward_features` and :meth:`forward_head`.
    """

    num_classes: int
    in_chans: int
    num_features: int
    feature_info: Any

    # -- what a subclass implements

    def forward_stages(
        self, x: Tensor, indices: Sequence[int] = (), *, norm: bool = False, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the body on images (batch, in_chans, H, W).

        Returns the body's last output (before the final norm and head, in the model's own layout) and the maps
        (batch, C, h, w) at ``indices`` (absolute, one for each entry of ``feature_info``), in the order of the body.
        ``norm``: apply the model's own output norm to the maps where it has one. ``stop_early``: stop after the last.
        """
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, H, W) to the normalised output of the body, before pooling."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of :meth:`forward_features` to logits (batch, num_classes); ``pre_logits``: to pooled features."""
        raise NotImplementedError

    # -- the calls

    def forward(self, x: Tensor) -> Any:
        if self.out_indices is not None:
            return self.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's call: the maps at ``indices`` (None: all; n: the last n), alone or after the body's last output."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; expected 'NCHW' or 'NHWC'")
        take, _ = feature_take_indices(len(self.feature_info), check_indices(indices, len(self.feature_info)))
        last, maps = self.forward_stages(x, take, norm=norm, stop_early=stop_early)
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (last, maps)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one (0: none). ``global_pool`` is left as it is unless the model has one."""
        self.num_classes = num_classes
        like = next(self.parameters())
        dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps at ``indices`` do not need; returns the absolute indices. Here: the classifier."""
        take, _ = feature_take_indices(len(self.feature_info), check_indices(indices, len(self.feature_info)))
        if prune_head:
            self.reset_classifier(0)
        return take


def check_indices(indices: Indices, count: int) -> Any:
    """Indices of ``count`` feature maps as timm takes them, ascending; the message of a bad one names the count."""
    if indices is None:
        return count
    if isinstance(indices, Integral) and not isinstance(indices, bool):
        if not 1 <= int(indices) <= count:
            raise ValueError(f"{indices} feature maps were asked for; this model has {count}")
        return int(indices)
    wanted = list(indices) if isinstance(indices, Iterable) else [indices]
    whole = all(isinstance(i, Integral) and not isinstance(i, bool) and -count <= int(i) < count for i in wanted)
    found = sorted({int(i) % count for i in wanted}) if whole else []
    if not found or len(found) < len(wanted):
        raise ValueError(f"feature indices are {wanted}; expected one or more of 0 to {count - 1}, each once")
    return found


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def timm_cfg(model: Any) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` of a model that the zoo built: preprocessing of its weights, or ImageNet's defaults."""
    info = getattr(model, "zoo_info", None)
    weights = info.weights if info is not None else None
    given = weights.preprocess if weights is not None else {}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    channels = getattr(model, "in_chans", 3)
    shape = info.card.input.get("shape") if info is not None and info.card is not None else None
    size = getattr(model, "img_size", None) or (tuple(shape[1:]) if shape and len(shape) == 3 else (224, 224))
    return {
        "architecture": info.architecture if info is not None else type(model).__name__.lower(),
        "tag": info.tag if info is not None else None,
        "num_classes": getattr(model, "num_classes", None),
        "input_size": settings.pop("input_size", (channels, *size)),
        "fixed_input_size": getattr(model, "img_size", None) is not None,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": IMAGENET_DEFAULT_MEAN if channels == 3 else (0.5,) * channels,
        "std": IMAGENET_DEFAULT_STD if channels == 3 else (0.5,) * channels,
        "first_conv": model.first_conv,
        "classifier": model.classifier,
        "license": weights.licence if weights is not None else None,
        "hf_hub_id": weights.repo_id if weights is not None else None,
    } | settings


Model = TypeVar("Model", bound=Habits)
F = TypeVar("F", bound=Callable[..., Any])


def build(cls: type[Model], *, features_only: bool = False, out_indices: Indices = None, **config: Any) -> Model:
    """``cls(**config)``, as a feature pyramid if ``features_only``. The builders of the cards are this with a class."""
    check_count("in_chans", config.get("in_chans", 3))
    size = config.get("img_size", 1)
    for side in size if isinstance(size, (tuple, list)) else (size,):
        check_count("img_size", side)
    model = cls(**config)
    if features_only:
        model.as_pyramid(out_indices)
    elif out_indices is not None:
        raise ValueError(f"out_indices={out_indices!r} has a meaning only together with features_only=True")
    return model


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} is {value!r}; expected 1 or more")


def takes(*callables: Any, pyramid: bool = True, without: Collection[str] = ()) -> Callable[[F], F]:
    """Give a builder with ``**config`` the named parameters of ``callables`` (classes that pass arguments on to one
    another) and, with ``pyramid``, ``features_only``/``out_indices``, so that a misspelt argument is found before
    anything is built. ``without``: parameters that the builder gives itself."""

    def decorate(function: F) -> F:
        found: dict[str, inspect.Parameter] = {}
        for one in (function, *callables):
            for name, parameter in inspect.signature(one).parameters.items():
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name not in without:
                    found.setdefault(name, parameter.replace(kind=parameter.KEYWORD_ONLY))
        for name, default in (("features_only", False), ("out_indices", None)) if pyramid else ():
            found.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
        function.__signature__ = inspect.Signature(list(found.values()))  # type: ignore[attr-defined]
        return function

    return decorate


def check_reference_config(
    system: str, config: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Collection[str] = ()
) -> dict[str, Any]:
    """An original constructor's arguments with its ``defaults`` filled in.

    ``ignored``: arguments that the original accepts and never reads. Raises ValueError for any other that is not in
    ``defaults``, naming it and the nearest that exist.
    """
    for key in config:
        if key not in defaults and key not in ignored:
            near = get_close_matches(key, defaults, n=3)
            hint = f"nearest: {', '.join(near)}" if near else f"it has: {', '.join(defaults)}"
            raise ValueError(f"the original {system} has no argument {key!r} (received {config[key]!r}); {hint}")
    return {**defaults, **{k: v for k, v in config.items() if k in defaults}}


def feature_info_of(backbone: nn.Module) -> Any:
    """timm's ``FeatureInfo`` of a backbone that gives a list of maps. Raises ValueError for one that gives none."""
    if getattr(backbone, "out_indices", None) is None:
        raise ValueError(
            f"the backbone {type(backbone).__name__} gives no list of maps: build it with features_only=True, or give "
            "the channels of its maps"
        )
    return backbone.feature_info


def pyramid(backbone: str, **config: Any) -> Any:
    """The classifier of this name as a pyramid, with its card's arguments and ``config``. Raises ValueError for a model
    of another task."""
    card, _ = catalog.find(backbone)
    if card.task != "image-classification":
        raise ValueError(
            f"backbone is {backbone!r}, a model for {card.task}; expected an image classifier, as vmamba_tiny"
        )
    return building.construct(card, {**card.config, **config, "features_only": True})


def freeze_norms(module: nn.Module) -> None:
    """Batch norms of ``module`` to evaluation mode: a detector's few images say little about means and deviations."""
    for inner in module.modules():
        if isinstance(inner, (nn.BatchNorm1d, nn.BatchNorm2d)):
            inner.eval()


# ``timm.create_model("vim_tiny")`` works from here on.
register_timm()
