"""This plugin's image classifiers in timm's registry, so that ``timm.create_model("vim_tiny")`` works.

:func:`register_timm` runs when any model module of this plugin is imported (so after the first ``zoo.create`` or
``zoo.load`` of a vision model), or when a user calls ``zoo_vision.register_timm()``. Names that timm has itself
(MambaOut, EfficientViM) stay timm's. Weights come through ``zoo.load``: pinned, checked, converted, strict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, is_model, register_model

from zoo_registry import ModelCard, WeightsCard, load_cards

#: timm reads the settings of an entry point from this name of its module
default_cfgs: dict[str, Any] = {}
_CFG_FIELDS = {f.name for f in dataclasses.fields(PretrainedCfg)}


def register_timm() -> list[str]:
    """Register every classifier of this plugin with timm, under its name and its short names. Returns the new names.

    Entry points take timm's arguments (``pretrained``, ``pretrained_cfg``, ``cache_dir``, ``num_classes``,
    ``features_only``, ``out_indices``, ``in_chans`` ...) and the model's own.
    """
    added = []
    for card in load_cards("zoo_vision"):
        if card.task != "image-classification":
            continue
        for name in (card.name, *card.aliases):
            if is_model(name):
                continue
            cfgs = {f"{name}.{tag}": _cfg(card, weights) for tag, weights in card.weights.items()}
            default_cfgs.update(generate_default_cfgs(cfgs or {name: {}}))
            register_model(_entry(card, name))
            added.append(name)
    return added


def _cfg(card: ModelCard, weights: WeightsCard) -> dict[str, Any]:
    """The part of a weights card that timm has a field for."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in weights.preprocess.items() if k in _CFG_FIELDS}
    return settings | {
        "num_classes": weights.num_classes,
        "hf_hub_id": weights.repo_id,
        "hf_hub_filename": weights.filename,
        "file": None,
        "license": weights.licence,
        "paper_ids": card.paper,
        "origin_url": f"https://github.com/{card.reference_code}" if card.reference_code else None,
    }


def _entry(card: ModelCard, name: str) -> Callable[..., Any]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> Any:
        import zoo

        tag = getattr(pretrained_cfg, "tag", pretrained_cfg)
        full = f"{card.name}.{tag}" if isinstance(tag, str) and tag else card.name
        if pretrained:
            if cache_dir is not None:
                kwargs["cache_dir"] = cache_dir
            model = zoo.load(full, **kwargs)
        else:
            model = zoo.create(full, **kwargs)
        if pretrained_cfg_overlay:
            model.pretrained_cfg = {**model.pretrained_cfg, **pretrained_cfg_overlay}
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"{card.description or card.name} (from the zoo's vision plugin)."
    return create
