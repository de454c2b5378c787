"""Pairs of images to maps of change: binary, from-to, or building damage; whole scenes window by window."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.files import check_ending, check_place, whole
from zoo.pipelines import Pipeline

from .change_maps import MAPS, ChangeMap, ChangeSummary, Tally, count_buildings, overlay
from .folders import together, two_dates
from .palettes import class_names, colours, label_set
from .rasters import (
    EXTENSIONS,
    GEOTIFFS,
    NO_DATA,
    MapReader,
    MapWriter,
    Scene,
    bad_input,
    check_pair,
    open_scene,
    small_cache,
)
from .tiling import Box, blended

Pair = tuple[Scene, Scene]


class ChangeDetection(Pipeline):
    """Two images of one place to a :class:`ChangeMap`: ``pipe(("before.tif", "after.tif"))``.

    Arguments
        tile, overlap: pixels; scenes larger than a tile are cut into tiles that overlap and are blended.
        pixel_area: square metres that a pixel covers, where the file does not say.
        bands: which bands of a GeoTIFF are red, green and blue, counted from 1 (default: those that the model was
        trained on here, otherwise the first three).
        value_range: (low, high), the values that become 0 and 255; for files that do not hold uint8 (likewise).
        class_names: names of the classes, of models whose card names none.

    The kind of answer follows from the model: binary (logits), semantic (``SemanticChange``) or damage (``Damage``).
    Sizes, bands, projections and grids of the two files must agree; what does not is named in the error. A folder does
    not say which of its files is the earlier one: give files in order, two folders with files of equal names
    (``pipe(["T1", "T2"])``), or the folder that holds two such (T1 and T2, A and B, im1 and im2).
    :meth:`write` maps scenes that are larger than memory, from file to file.
    """

    task = "binary-change-detection"
    extensions = EXTENSIONS
    files_per_sample = 2

    def __init__(
        self,
        model: nn.Module,
        tile: int = 512,
        overlap: int = 64,
        pixel_area: float | None = None,
        bands: Sequence[int] | None = None,
        value_range: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model)
        if tile < 32 or not 0 <= overlap < tile:
            raise bad_input(
                f"tile is {tile} and overlap {overlap}; expected tile >= 32 and 0 <= overlap < tile", "tile"
            )
        self.tile, self.overlap, self.pixel_area = int(tile), int(overlap), pixel_area
        self.channels = int(getattr(model, "in_chans", 3))
        settings = self.preprocess
        self.reading: dict[str, Any] = {
            "bands": settings.get("bands") if bands is None else bands,
            "value_range": settings.get("value_range") if value_range is None else value_range,
            "channels": self.channels,
        }
        if pixel_area is not None and not 0 < pixel_area < math.inf:
            raise bad_input(f"pixel_area is {pixel_area}; expected the square metres of a pixel, above 0", "pixel_area")
        self.given_names = None if class_names is None else list(class_names)
        if self.given_names is not None and len(self.given_names) != self._classes:
            raise bad_input(
                f"class_names has {len(self.given_names)} names; the model has {self._classes} classes", "class_names"
            )
        self.mean, self.std = (
            self._per_channel(settings.get(key, default))
            for key, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))
        )

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        """One value a band; a model built for other bands than its weights gets their mean."""
        found = torch.tensor(list(values), dtype=torch.float32)
        return (found if len(found) == self.channels else found.mean().expand(self.channels)).reshape(-1, 1, 1)

    # -- what the model answers

    @property
    def _classes(self) -> int:
        """How many the last map has, the one whose classes have names."""
        count = {"binary": "num_classes", "semantic": "semantic_classes", "damage": "damage_classes"}[self.kind]
        return int(getattr(self.model, count, 2))

    @property
    def kind(self) -> str:
        if hasattr(self.model, "damage_classes"):
            return "damage"
        return "semantic" if hasattr(self.model, "semantic_classes") else "binary"

    @property
    def layers(self) -> dict[str, list[str]]:
        """The maps of this model and the names of their classes, in the order in which they are written."""
        names, count = self.given_names or self.labels(), self._classes
        if self.kind == "binary":
            return {"changed": class_names(names or label_set("change"), count)}
        if self.kind == "damage":
            return {"changed": ["no building", "building"], "after": class_names(names or label_set("xbd"), count)}
        known = names or self._labels_of_card()
        return {"changed": label_set("change"), **dict.fromkeys(("before", "after"), class_names(known, count))}

    def _labels_of_card(self) -> list[str] | None:
        """What the default weights of the model's card call the classes, for models with other weights or none."""
        from zoo_registry import read_labels

        card = self.info.card if self.info is not None else None
        found = read_labels(card) if card is not None and card.default_weights is not None else None
        return None if found is None else list(found)

    def outputs(self, pair: Pair) -> Iterator[tuple[Box, dict[str, np.ndarray]]]:
        """Finished parts of what the model says: (box, {output: likeliest class (h, w) uint8})."""
        with small_cache(), torch.inference_mode():
            for box, found in blended(
                lambda tile: self._probabilities(pair, tile), pair[0].height, pair[0].width, self.tile, self.overlap
            ):
                yield box, {name: p.argmax(0).numpy().astype(np.uint8) for name, p in found.items()}

    def blocks(self, pair: Pair) -> Iterator[tuple[Box, dict[str, np.ndarray]]]:
        """Finished parts of the maps: (box, {layer: (h, w) uint8}), 255 where a date has no data."""
        for box, found in self.outputs(pair):
            maps = self._layers(found)
            for scene in pair:
                valid = scene.read_valid(*box)
                if valid is not None:
                    for one in maps.values():
                        one[~valid] = NO_DATA
            yield box, maps

    def _probabilities(self, pair: Pair, box: Box) -> dict[str, Tensor]:
        """One tile through the model: {output: probabilities (classes, h, w)}."""
        dates = []
        for scene in pair:
            pixels = torch.tensor(scene.read(*box)).permute(2, 0, 1)
            dates.append(self._to_model((pixels / 255 - self.mean) / self.std)[None])
        output = self.model(*dates)
        maps = {"change": output} if isinstance(output, Tensor) else output._asdict()
        return {name: logits[0].float().softmax(0) for name, logits in maps.items()}

    def _layers(self, maps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The model's outputs as maps: classes are 0 where nothing changed, damage where no building stood."""
        if self.kind == "damage":
            return {"changed": maps["building"], "after": maps["damage"] * (maps["building"] > 0)}
        changed = maps["change"]
        if self.kind == "semantic":
            return {"changed": changed, **{k: maps[k] * (changed > 0) for k in ("before", "after")}}
        return {"changed": changed}

    # -- scenes in memory

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        """Pairs from files in order, from two folders with files of equal names, or from a folder that holds two."""
        if isinstance(inputs, list):
            inputs = [tuple(one) if isinstance(one, list) else one for one in inputs]
        given = inputs if isinstance(inputs, list) else [inputs]
        places = [Path(one).expanduser() for one in given if isinstance(one, (str, Path))]
        folders = [place for place in places if place.is_dir()]
        if patterns := [place for place in places if glob.has_magic(str(place)) and not place.exists()]:
            raise bad_input(f"{patterns[0]} does not say which dates its files are of; give files in order, or folders")
        if not folders:
            return super().expand(inputs)
        if len(folders) == len(given) == 1:
            folders = two_dates(folders[0])
        elif len(folders) != len(given) or len(folders) != 2:
            raise bad_input(
                f"{len(folders)} of {len(given)} inputs are folders; expected files in order, or a folder for each date"
            )
        return [tuple(files) for _, files in together(folders)], False

    def read(self, source: Any) -> Pair:
        if not isinstance(source, (tuple, list)) or len(source) != 2:
            raise bad_input(f"{type(source).__name__} was given; expected a pair (before, after)")
        before = open_scene(source[0], **self.reading)
        try:
            after = open_scene(source[1], **self.reading)
            check_pair(before, after)
        except BaseException:
            before.close()
            raise
        return before, after

    def prepare(self, sample: Any) -> Any:
        return sample  # tiles are read when they are needed

    def collate(self, samples: Any) -> Any:
        return list(samples)

    def forward(self, batch: Any) -> Any:
        return [self._map(pair) for pair in batch]

    def split(self, output: Any, count: int) -> list[Any]:
        return output

    def _map(self, pair: Pair) -> ChangeMap:
        layers, shape = self.layers, (pair[0].height, pair[0].width)
        full: dict[str, Any] = {name: np.empty(shape, np.uint8) for name in layers}
        tally = Tally(self.kind, layers)
        for (top, left, height, width), maps in self.blocks(pair):
            tally.add(maps)
            for name, part in maps.items():
                full[name][top : top + height, left : left + width] = part
        result = ChangeMap(scene=pair[1], layers=layers, **full)
        for scene in pair:
            scene.close()  # the picture opens the later one again
        tally.fill(result, self._area(pair))
        if self.kind == "damage":
            result.buildings = count_buildings(result.read, *shape, layers["after"], "after")
        return result

    def finish(self, output: Any, sample: Any) -> ChangeMap:
        return output

    def _area(self, pair: Pair) -> float | None:
        return self.pixel_area if self.pixel_area is not None else pair[0].pixel_area

    # -- scenes from file to file

    def write(
        self,
        source: Any,
        path: str | Path | None,
        *,
        picture: str | Path | None = None,
        summary: str | Path | None = None,
    ) -> ChangeSummary:
        """Map a pair into files, window by window: memory grows with the tile, not with the scene.

        ``path``: a ``.tif`` with the scene's georeference, one band a map (``.png`` for pairs of pictures; None writes
        no map). ``picture``: a PNG of the later date with the map over it, thinned to 2048 pixels a side. ``summary``:
        the counts as JSON. Raises BadArgument for pairs that do not fit together, and, before the work, for a file that
        is one of the pair or has an ending of another format; StoreError for one that cannot be written.
        """
        pair = self.read(source)
        try:
            _check_outputs(pair, path, picture, summary)
            result = self._written(pair, path, picture)
        finally:
            for scene in pair:
                scene.close()
        if summary is not None:
            text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False)
            with whole(summary) as work:
                work.write_text(text, encoding="utf-8")
            result.files["summary"] = str(summary)
        return result

    def _written(self, pair: Pair, path: str | Path | None, picture: str | Path | None) -> ChangeSummary:
        if path is None or Path(path).suffix.lower() not in GEOTIFFS:
            result: ChangeSummary = self._map(pair)
            assert isinstance(result, ChangeMap)
            if path is not None:
                result.files["map"] = str(result.save(path))
            if picture is not None:
                result.files["picture"] = str(result.save_picture(picture))
        else:
            result = self._stream(pair, Path(path), None if picture is None else Path(picture))
        result.source, result.model = f"{pair[0].name} + {pair[1].name}", self.name
        return result

    def _stream(self, pair: Pair, path: Path, picture: Path | None) -> ChangeSummary:
        layers = self.layers
        tally, result = Tally(self.kind, layers), ChangeSummary()
        with small_cache():
            with MapWriter(path, pair[0], layers, colours(list(layers.values())[-1])) as writer:
                for box, maps in self.blocks(pair):
                    tally.add(maps)
                    writer.write(box[0], box[1], maps)
            tally.fill(result, self._area(pair))
            result.files["map"] = str(path)
            with MapReader(path, layers) as written:
                if self.kind == "damage":
                    names = layers["after"]
                    result.buildings = count_buildings(written, pair[0].height, pair[0].width, names, "after")
                if picture is not None:
                    with whole(picture) as work:
                        overlay(pair[1], written, layers).save(work)
                    result.files["picture"] = str(picture)
        return result


def _check_outputs(pair: Pair, path: str | Path | None, picture: str | Path | None, summary: str | Path | None) -> None:
    """Raise for what could not be written, or would be written over the pair, before a scene is mapped."""
    if path is not None:
        check_ending(path, MAPS)
    if picture is not None:
        check_ending(picture)
    given = [(scene.path or Path(scene.name)).resolve() for scene in pair]
    for out in (path, picture, summary):
        if out is not None:
            check_place(out)
            if Path(out).resolve() in given:
                raise bad_input(f"{out} is one of the pair; give the output a name of its own", "path")


class SemanticChangeDetection(ChangeDetection):
    """:class:`ChangeDetection` with a from-to table."""

    task = "semantic-change-detection"


class DamageAssessment(ChangeDetection):
    """:class:`ChangeDetection` with damage grades of buildings, and buildings counted by grade."""

    task = "damage-assessment"
