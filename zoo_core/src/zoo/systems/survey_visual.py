"""Scan orders of vision state-space models under the names that "A Survey on Visual Mamba" (arXiv 2404.15956) and the
systems' own code give them; the orders themselves are :mod:`zoo_kernels.paths`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo_kernels import paths

#: Orders of a plane: one row without a directions axis for those in _SINGLE.
PLANE = {
    "h": "raster", "h_flip": "reverse", "v": "column", "v_flip": "reverse(column)", "bidirectional_2": "bidirectional",
    "cross_scan_4": "cross", "continuous_2d_4": "continuous", "sweep_8": "sweep", "zigma_8": "zigma",
    "jpeg_zigzag_8": "jpeg_zigzag", "efficient_step2_4": "efficient(step=2, pad=true)",
    "omnidirectional_8_cyclic": "omnidirectional", "diagonal_true": "diagonal", "antidiagonal_true": "antidiagonal",
    "hilbert": "hilbert", "morton_z_order": "morton", "spiral": "spiral", "occmamba_quadrant_u_order_2d": "quadrant",
}  # fmt: skip
#: Of a window of side {w}; on a grid that w does not divide, indices are those of the padded grid.
LOCAL = {
    "local_w{w}": "local(w={w}, pad=true)",
    "local_w{w}_flip": "reverse(local(w={w}, pad=true))",
    "local_w{w}_column_first": "local(w={w}, column_first=true, pad=true)",
}
#: Of a volume (T, H, W).
VOLUME = {
    "3d_spatial_first": "raster", "3d_temporal_first": "temporal_first", "3d_axis_orders_6": "axis_orders",
    "3d_bidirectional_spatiotemporal_4": "spacetime", "3d_tri_orientated_3": "tri_orientated", "3d_snake": "snake",
    "3d_hilbert": "hilbert",
}  # fmt: skip
HEIGHT = 3  # of occmamba_height_expanded_z3


def _directions(name: str) -> bool:
    """Whether the survey's name is of a family, which keeps its directions axis."""
    return name.rsplit("_", 1)[-1] in ("2", "3", "4", "6", "8") or name.endswith("cyclic")


class ScanOrders(nn.Module):
    """``forward(name)``: the order of that name, int32, (steps,) or (directions, steps)."""

    def __init__(self, H: int, W: int, T_H_W: tuple[int, int, int], window: int) -> None:
        super().__init__()
        self.plane, self.volume, self.window = (H, W), T_H_W, window

    def names(self) -> list[str]:
        cube = len(set(self.volume)) == 1 and self.volume[0] & (self.volume[0] - 1) == 0
        local = [name.format(w=self.window) for name in LOCAL]
        extra = ["continuous_2d_4_direction_codes", "occmamba_height_expanded_z3"]
        return [*PLANE, *local, *extra, *(n for n in VOLUME if n != "3d_hilbert" or cube)]

    def forward(self, name: str) -> Tensor:
        local = {k.format(w=self.window): v.format(w=self.window) for k, v in LOCAL.items()}
        if name == "continuous_2d_4_direction_codes":
            return paths.direction_codes(paths.get("continuous", self.plane), self.plane).int()
        if name == "occmamba_height_expanded_z3":
            return paths.get("height(quadrant)", (*self.plane, HEIGHT))[0].int()
        if name in VOLUME:
            order = paths.get(VOLUME[name], self.volume)
        elif name in PLANE or name in local:
            order = paths.get(PLANE.get(name) or local[name], self.plane)
        else:
            raise ValueError(f"no scan order is called {name!r}; known: {', '.join(self.names())}")
        return (order if _directions(name) else order[0]).int()


class ScanOrdersAdapter(ReferenceAdapter):
    """Index vectors only: no weights."""

    system = "survey_visual"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        unknown = sorted(set(config) - {"H", "W", "T_H_W", "window"})
        if unknown:
            raise ValueError(f"the scan orders have no argument {unknown[0]!r}; they have H, W, T_H_W and window")
        t, h, w = config.get("T_H_W", (1, config["H"], config["W"]))
        return ScanOrders(config["H"], config["W"], (t, h, w), config.get("window", 2)).eval()

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        assert isinstance(model, ScanOrders)
        return {name: model(name) for name in (model.names() if wanted is None else wanted)}
