"""A capture file in; how well a masked autoencoder rebuilds the bytes of every flow that it does not see, out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from zoo.files import whole
from zoo.pipelines import Result
from zoo_registry import errors

from .flows import Flow
from .netmamba import NetMambaPretrain
from .packets import NAMES
from .pipelines import FlowPipeline, Sample

#: pixels of a byte in the picture, and of the lines between them
_DOT, _LINE = 3, 16
_HIDDEN = (70, 110, 190)


@dataclass
class RebuiltFlow:
    """One flow's bytes as they are and as the model rebuilds them. Errors are over the hidden strides alone."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    protocol: str
    packets: int
    loss: float  #: mean squared error as in training, of bytes scaled to [-1, 1]
    byte_error: float  #: mean absolute difference of byte values, 0 to 255
    bytes: np.ndarray = field(repr=False)  #: (size,) uint8, what the model reads of the flow
    rebuilt: np.ndarray = field(repr=False)  #: (size,) uint8: hidden ones by the model, the others as they are
    hidden: np.ndarray = field(repr=False)  #: (size,) bool, True where the model saw nothing


@dataclass(kw_only=True)
class RebuiltTraffic(Result):
    """The flows of IPv4 of one capture, in the order of their first packets."""

    loss: float | None  #: mean over the flows; None without any
    byte_error: float | None
    mask_ratio: float
    flows: list[RebuiltFlow] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)  #: what was left out, or found damaged

    def summary(self) -> str:
        if self.loss is None:
            return "no flows of IPv4"
        return (
            f"{len(self.flows)} flows, {self.mask_ratio:.0%} hidden: loss {self.loss:.4f}, {self.byte_error:.1f} of "
            "255 off in a byte"
        )

    def __str__(self) -> str:
        rows = [f"{self.source}: {self.summary()}"]
        for flow in self.flows:
            ends = f"{flow.source}:{flow.source_port} > {flow.destination}:{flow.destination_port}"
            rows.append(f"  {flow.protocol:5} {ends}  loss {flow.loss:.4f}, {flow.byte_error:.1f} off in a byte")
        return "\n".join([*rows, *(f"  note: {note}" for note in self.notes)])

    def _derived(self) -> dict[str, Any]:
        numbers = ("bytes", "rebuilt", "hidden")
        rows = [{k: v for k, v in vars(flow).items() if k not in numbers} for flow in self.flows]
        return {**super()._derived(), "flows": rows}

    def save(self, path: str | Path) -> Path:
        """An .npz file with ``bytes`` and ``rebuilt`` (flows, size) uint8 and ``hidden`` (flows, size) bool."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"{path}: rebuilt bytes are written as .npz, not as {path.suffix or 'nothing'!r}")
        found = {name: [getattr(flow, name) for flow in self.flows] for name in ("bytes", "rebuilt", "hidden")}
        with whole(path) as work:
            np.savez_compressed(work, **{name: np.array(rows) for name, rows in found.items()})  # type: ignore[arg-type]
        return path

    def picture(self, flows: int = 6) -> Image.Image:
        """The first ``flows`` flows: their bytes, what the model sees of them (hidden ones blue), and what it makes
        of that. A row of bytes is 40, as in the authors' pictures."""
        shown = self.flows[:flows]
        width = 40
        tall = max((-(-len(flow.bytes) // width) for flow in shown), default=1)
        block = (width * _DOT + 8, tall * _DOT + _LINE + 8)
        sheet = Image.new("RGB", (3 * block[0], _LINE + max(1, len(shown)) * block[1]), "white")
        draw = ImageDraw.Draw(sheet)
        for column, name in enumerate(("bytes", "seen", "rebuilt")):
            draw.text((column * block[0] + 4, 2), name, fill="black")
        for i, flow in enumerate(shown):
            top = _LINE + i * block[1]
            draw.text((4, top), f"{flow.protocol} port {flow.destination_port}: loss {flow.loss:.4f}", fill="black")
            whole, rebuilt = _grey(flow.bytes, width), _grey(flow.rebuilt, width)
            seen = whole.copy()
            seen[_rows(flow.hidden, width)] = _HIDDEN
            for column, pixels in enumerate((whole, seen, rebuilt)):
                size = (width * _DOT, len(pixels) * _DOT)
                tile = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
                sheet.paste(tile, (column * block[0] + 4, top + _LINE))
        return sheet


class TrafficRebuilding(FlowPipeline):
    """Captures (pcap, pcapng) to the bytes of each flow that a masked autoencoder rebuilds from the others.

    ``mask_ratio`` of the strides are hidden, at random from ``seed``: the same capture gives the same answer.
    bidirectional, timeout, packets, header_bytes, payload_bytes, flows_per_batch: as in
    :class:`~zoo_network.pipelines.TrafficClassification`. Models whose targets are normalised within each stride
    (``norm_pix_loss``) predict no level; their bytes are shown with the true mean and deviation of each stride.
    """

    task = "traffic-pretraining"
    answer = "bytes to rebuild"

    def __init__(
        self,
        model: nn.Module,
        mask_ratio: float = 0.9,
        seed: int = 0,
        bidirectional: bool | None = None,
        timeout: float | None = None,
        packets: int | None = None,
        header_bytes: int | None = None,
        payload_bytes: int | None = None,
        flows_per_batch: int = 128,
    ) -> None:
        if not isinstance(model, NetMambaPretrain):
            raise errors.BadArgument(
                f"{type(model).__name__} rebuilds nothing; expected a masked autoencoder (netmamba_pretrain)",
                argument="model",
                accepted=[],
            )
        super().__init__(
            model,
            bidirectional,
            timeout,
            flows_per_batch,
            packets=packets,
            header_bytes=header_bytes,
            payload_bytes=payload_bytes,
        )
        self.autoencoder = model
        strides = model.byte_length // model.stride_size
        if not 0 < mask_ratio < 1 or not 0 < int(strides * (1 - mask_ratio)) < strides:
            raise errors.BadArgument(
                f"mask_ratio is {mask_ratio}; expected a share above 0 and below 1 that hides and shows at least one "
                f"of {strides} strides",
                argument="mask_ratio",
                accepted=[],
            )
        self.mask_ratio, self.seed, self.strides = mask_ratio, seed, strides

    def prepare(self, sample: Sample) -> dict[str, Tensor]:
        """``flows`` (flows, bytes) and ``rank`` (flows, strides): in which order the strides would be shown."""
        flows = self.rows(sample)
        drawn = torch.rand(len(flows), self.strides, generator=torch.Generator().manual_seed(self.seed))
        return {"flows": flows, "rank": drawn.argsort(dim=1).argsort(dim=1)}

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """(captures, flows, bytes) to ``pred`` (captures, flows, strides, stride) and ``mask``, 1 where hidden."""
        shape = batch["flows"].shape[:2]
        size = (0, self.strides, self.autoencoder.stride_size)
        pred, mask = [batch["flows"].new_zeros(size)], [batch["flows"].new_zeros(size[:2])]
        pairs = zip(*(batch[k].flatten(0, 1).split(self.flows_per_batch) for k in ("flows", "rank")), strict=True)
        for flows, rank in pairs:
            if len(flows):
                found = self.autoencoder(flows, self.mask_ratio, rank)
                pred.append(found["pred"])
                mask.append(found["mask"])
        return {"pred": torch.cat(pred).unflatten(0, shape), "mask": torch.cat(mask).unflatten(0, shape)}

    def finish(self, output: dict[str, Tensor], sample: Sample) -> RebuiltTraffic:
        read = [flow for flow in sample.flows if flow.version == 4]
        rows = zip(read, self.rows(sample), output["pred"].float(), output["mask"].float(), strict=True)
        flows = [self._one(*row) for row in rows]
        count = max(len(flows), 1)
        return RebuiltTraffic(
            loss=sum(f.loss for f in flows) / count if flows else None,
            byte_error=sum(f.byte_error for f in flows) / count if flows else None,
            mask_ratio=self.mask_ratio,
            flows=flows,
            notes=sample.notes,
        )

    def _one(self, flow: Flow, values: Tensor, pred: Tensor, mask: Tensor) -> RebuiltFlow:
        strides = values.view(self.strides, -1)
        loss = self.autoencoder.rebuilding_loss(values[None], pred[None], mask[None])
        if self.autoencoder.norm_pix_loss:
            pred = pred * (strides.var(-1, keepdim=True) + 1e-6).sqrt() + strides.mean(-1, keepdim=True)
        hidden = mask.bool().repeat_interleave(strides.shape[1])
        whole = ((values + 1) * 127.5).round()
        made = torch.where(hidden, ((pred.flatten() + 1) * 127.5).round().clamp(0, 255), whole)
        return RebuiltFlow(
            flow.endpoints.source,
            flow.endpoints.source_port,
            flow.endpoints.destination,
            flow.endpoints.destination_port,
            NAMES.get(flow.endpoints.protocol, str(flow.endpoints.protocol)),
            flow.packets,
            loss=float(loss),
            byte_error=float((made - whole).abs()[hidden].mean()),
            bytes=whole.to(torch.uint8).numpy(),
            rebuilt=made.to(torch.uint8).numpy(),
            hidden=hidden.numpy(),
        )


def _rows(values: np.ndarray, width: int) -> np.ndarray:
    """(size,) to (rows, width), the last row filled with zeros."""
    return np.pad(values, (0, -len(values) % width)).reshape(-1, width)


def _grey(values: np.ndarray, width: int) -> np.ndarray:
    return np.repeat(_rows(values, width)[..., None], 3, axis=2)
