"""What every backbone of this plugin has in common: the habits that users of timm expect.

:class:`VisionModel` is mixed into our own models and, before them, into timm's own classes, so that all of them
answer the same calls: ``forward_features``, ``forward_head``, ``forward_intermediates``, ``features_only`` pyramids,
``reset_classifier``, ``get_classifier``, ``set_grad_checkpointing``, ``group_matcher``, ``no_weight_decay`` and
``default_cfg``. :func:`build` is what the cards' builders call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from timm.layers import get_device_dtype
from timm.models._features import FeatureInfo, feature_take_indices
from torch import Tensor, nn

Indices = int | Sequence[int] | None


class VisionModel(nn.Module):
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
    grad_checkpointing: bool = False
    #: set by :meth:`as_pyramid`: ``forward`` returns the list of maps at these indices
    out_indices: list[int] | None = None
    #: keys of the whole model that a pyramid does not have; a loader may find them in a checkpoint and leave them out
    dropped_keys: frozenset[str] = frozenset()
    #: timm's description of the pretrained weights; filled in when weights or a card are known
    pretrained_cfg: dict[str, Any] | None = None
    default_cfg: dict[str, Any] | None = None

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
        take, _ = feature_take_indices(len(self.feature_info), self._indices(indices))
        last, maps = self.forward_stages(x, take, norm=norm, stop_early=stop_early)
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (last, maps)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one (0: none). ``global_pool`` is left as it is unless the model has one."""
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes > 0 else nn.Identity()
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that recipes leave out of weight decay: position tables, class tokens, A and D of every scan."""
        ends = ("A_log", "A_b_log", ".D", "dt_bias", "pos_embed", "cls_token", "cls_token_head", "cls_token_tail")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": r"^(?:blocks|layers|levels|stages)\.(\d+)"
            if coarse
            else [(r"^(?:blocks|layers|levels|stages)\.(\d+)(?:\.blocks\.(\d+))?", None), (r"^norm", (99999,))],
        }

    # -- pyramids

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps at ``indices`` do not need; returns the absolute indices. Here: the classifier."""
        take, _ = feature_take_indices(len(self.feature_info), self._indices(indices))
        if prune_head:
            self.reset_classifier(0)
        return take

    def as_pyramid(self, out_indices: Indices = None) -> VisionModel:
        """Turn this model into a feature pyramid, in place: ``forward`` then returns a list of maps.

        Keys of the state dict keep their names; those of removed parts are in ``dropped_keys``. ``feature_info``
        becomes timm's ``FeatureInfo`` (``.channels()``, ``.reduction()``).
        """
        before = set(self.state_dict())
        take = self.prune_intermediate_layers(out_indices if out_indices is not None else len(self.feature_info))
        self.feature_info = FeatureInfo(list(self.feature_info), out_indices=tuple(take))
        self.out_indices = take
        self.dropped_keys = frozenset(before - set(self.state_dict()))
        return self

    def _indices(self, indices: Indices) -> Any:
        """Check ``indices`` here, where the number of maps is known, so that the message can name it."""
        count = len(self.feature_info)
        if indices is None:
            return count
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"{indices} feature maps were asked for; this model has {count}")
            return indices
        bad = [i for i in indices if not -count <= i < count]
        if bad or not list(indices):
            raise ValueError(f"feature indices are {list(indices)}; expected one or more of 0 to {count - 1}")
        return sorted(i % count for i in indices)


Model = TypeVar("Model", bound=VisionModel)


def build(cls: type[Model], *, features_only: bool = False, out_indices: Indices = None, **config: Any) -> Model:
    """``cls(**config)``, as a feature pyramid if ``features_only``. The builders of the cards are this with a class."""
    model = cls(**config)
    if features_only:
        model.as_pyramid(out_indices)
    elif out_indices is not None:
        raise ValueError(f"out_indices={out_indices!r} has a meaning only together with features_only=True")
    return model


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
