"""What each scan direction contributes, token by token: measured, not interpreted.

A model that scans along K paths adds up K outputs at every token. Here they are taken apart (``PathScan.by_path``) and
their sizes compared. A large value says that this direction's state writes much at this place; it does not say that the
answer depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import PathScan
from zoo.layers.ss2d import CascadeScan, GridScan
from zoo_kernels import paths as scan_paths


@dataclass(frozen=True)
class Contributions:
    """``maps`` (K, h, w), one for each of ``names``; their mean over all is 1. ``blocks``: how many were averaged."""

    names: list[str]
    maps: Tensor
    blocks: int


def scan_contributions(model: nn.Module, image: Tensor) -> Contributions:
    """The size of every direction's contribution at every token, averaged over the blocks of a model.

    In each block: the Euclidean norm over channels of what the direction adds to the (gated) scan output, divided by
    its mean over directions and tokens, so that no block outweighs the others. Maps of later, smaller stages are
    enlarged to the first one's grid. image: (1, in_chans, H, W), prepared.

    Raises ValueError for a model without scans along several directions.
    """
    found: list[tuple[list[str], Tensor]] = []
    handles = [
        module.register_forward_hook(_watch(model, image, found), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, PathScan) and not isinstance(module, CascadeScan) and module.paths > 1
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} has no scans along several directions whose parts could be compared")
    names, grid = found[0][0], found[0][1].shape[1:]
    same = [maps for own, maps in found if own == names]
    grown = [F.interpolate(m[None], size=grid, mode="bilinear", align_corners=False)[0] for m in same]
    return Contributions(names, torch.stack(grown).mean(dim=0), len(same))


def _watch(model: nn.Module, image: Tensor, found: list[tuple[list[str], Tensor]]) -> Any:
    def record(module: PathScan, args: tuple[Tensor, ...], kwargs: dict[str, Any], _out: Tensor) -> None:
        if isinstance(module, GridScan):
            x = args[0]
            z = args[1] if len(args) > 1 else kwargs.get("z")
            grid = (int(x.shape[1]), int(x.shape[2]))
            order = scan_paths.get(module.path_names, grid, device=x.device)
            parts = module.by_path(x.flatten(1, 2), z=None if z is None else z.flatten(1, 2), path=order)
            names = _names(module.path_names, module.paths)
        else:
            path, reverse = kwargs.get("path"), kwargs.get("reverse", False)
            parts = module.by_path(args[0], z=kwargs.get("z"), path=path, reverse=reverse)
            grid = model.patch_embed.grid(image.shape[-2:])  # type: ignore[union-attr, operator]
            names = _names(getattr(model, "paths", ""), module.paths)
        sizes = parts[0].float().norm(dim=-1)  # (K, length)
        if sizes.shape[1] != grid[0] * grid[1]:
            from .vim_parts import class_slots

            slots = class_slots(model.cls, grid[0] * grid[1])  # type: ignore[arg-type]
            kept = [i for i in range(sizes.shape[1]) if i not in slots]
            sizes = sizes[:, kept]
        found.append((names, (sizes / sizes.mean().clamp(min=1e-12)).unflatten(1, grid)))

    return record


def _names(spec: str, count: int) -> list[str]:
    """One name for each direction of a path spec."""
    if spec == "bidirectional":
        return ["forwards", "backwards"]
    if spec == "cross":
        return ["rows", "columns", "rows back", "columns back"]
    single = [part.strip() for part in spec.split("+")]
    return single if len(single) == count else [f"{spec}[{k}]" for k in range(count)]
