"""Networks of mmsegmentation and mmdetection: their heads have our names, their backbones are other systems'.

So a state dict is read by two tables: what lies below ``backbone.`` by its own system's, the rest by the network's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from zoo import catalog
from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Rules

from .efficientvim import EfficientViM
from .mambavision import MambaVision
from .vmamba import VMamba

#: the class of the original's backbone as its configurations name it, and: system, class of ours, name for its adapter,
#: arguments that the name stands for
_BACKBONES: dict[str, tuple[str, type[nn.Module], str, dict[str, Any]]] = {
    "MM_VSSM": ("vmamba", VMamba, "Backbone_VSSM", {"out_indices": (0, 1, 2, 3)}),
    "MM_mamba_vision": ("mambavision", MambaVision, "MM_mamba_vision", {"out_indices": (0, 1, 2, 3)}),
    "EfficientViM_M4": (
        "efficientvim",
        EfficientViM,
        "EfficientViM",
        {"embed_dim": (224, 320, 512), "depths": (3, 4, 2), "state_dim": (64, 32, 16), "frozen_stages": 0},
    ),
}

Way = Literal["to_zoo", "to_reference"]


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict below ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def build_backbone(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The pyramid of a ``backbone`` table and a whole network's state dict. Raises ValueError for another type."""
    kind = config.get("type", "")
    if kind not in _BACKBONES:
        raise ValueError(f"the backbone's type is {config.get('type')!r}; expected {' or '.join(_BACKBONES)}")
    system, _, name, given = _BACKBONES[kind]
    body = {**given, **{k: v for k, v in config.items() if k != "type"}}
    return catalog.adapter(system).build(body, below("backbone.", unwrapped(state)), source=f"x:{name}")


def convert_backbone(state: Mapping[str, Tensor], way: Way, backbone: nn.Module) -> dict[str, Tensor]:
    """What lies below ``backbone.``, through the table of the backbone's own system; all else is left out."""
    system = next(system for system, cls, _, _ in _BACKBONES.values() if isinstance(backbone, cls))
    found = getattr(catalog.adapter(system), way)(below("backbone.", state), model=backbone)
    return {f"backbone.{k}": v for k, v in found.items()}


class NetworkAdapter(ReferenceAdapter):
    """Base of the adapters of such networks. ``network``: the class of ours; heads keep their keys unless
    :meth:`heads` says otherwise."""

    network: type[nn.Module]

    def heads(self, state: Mapping[str, Tensor], way: Way) -> dict[str, Tensor]:
        """All that does not lie below ``backbone.``, under the other side's keys."""
        return {k: v for k, v in state.items() if not k.startswith("backbone.")}

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        raise NotImplementedError(f"the table of a {self.system} is its backbone's, below 'backbone.'")

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        return self._converted(state, "to_zoo", model)

    def to_reference(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        return self._converted(state, "to_reference", model)

    def _converted(self, state: Mapping[str, Tensor], way: Way, model: nn.Module | None) -> dict[str, Tensor]:
        if not isinstance(model, self.network):
            raise ValueError(f"the state dict of a {self.system} is converted for a model: give model=")
        state, backbone = unwrapped(state), model.backbone
        assert isinstance(backbone, nn.Module)
        return convert_backbone(state, way, backbone) | self.heads(state, way)
