"""Clips to train on: videos with the poses in them, from folders, and as batches for a model.

    clips/
      walking/   frames.gif (or .mp4, or a folder frames/)   poses.npz (or .json)   reference.png (optional)

Without a reference (and its pose in the poses file) a random frame of the clip is one, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import media
from .drawing import SIZE, draw
from .encoders import Features, Latents
from .poses import EXTENSIONS, Poses, read_poses
from .training import Batch
from .unet import UNet


@dataclass
class Clip:
    """frames (n, H, W, 3) uint8 and their poses; reference (H, W, 3) and its pose, or None for both."""

    frames: np.ndarray
    poses: Poses
    reference: np.ndarray | None = None
    reference_pose: Poses | None = None

    def __post_init__(self) -> None:
        if len(self.frames) != len(self.poses):
            raise ValueError(f"a clip has {len(self.frames)} frames and {len(self.poses)} poses; expected as many")
        if (self.reference is None) != (self.reference_pose is None):
            raise ValueError("a clip has a reference without its pose, or the other way round; give both or neither")

    def cut(self, r: np.random.Generator, count: int) -> Clip:
        """``count`` frames from a random place on, with a reference: the clip's own or another of its frames."""
        start = int(r.integers(0, len(self.frames) - count + 1))
        piece, poses = self.frames[start : start + count], self.poses[slice(start, start + count)]
        if self.reference is not None:
            return Clip(piece, poses, self.reference, self.reference_pose)
        other = int(r.integers(0, len(self.frames)))
        return Clip(piece, poses, self.frames[other], self.poses[[other]])


def read_clips(folder: str | Path, size: tuple[int, int], least: int = 1) -> list[Clip]:
    """The clips of FOLDER/CLIP/ in the order of their names, pictures resized to ``size`` (width, height).

    Raises ValueError for a clip that cannot be read or has fewer than ``least`` frames, and where there is none.
    """
    found = []
    for place in sorted(p for p in Path(folder).iterdir() if p.is_dir()):
        files = {p.stem: p for p in sorted(place.iterdir())}
        poses = next((files["poses"] for e in EXTENSIONS if files.get("poses", place).suffix == e), None)
        if "frames" not in files or poses is None:
            raise ValueError(f"{place} lacks frames (.gif, .mp4 or a folder) or poses ({', '.join(EXTENSIONS)})")
        pictures = [np.asarray(f.resize(size)) for f in media.read_frames(files["frames"])]
        points, own = read_poses(poses)
        picture = None
        if own is not None and "reference" in files:
            picture = np.asarray(media.read_picture(files["reference"]).resize(size))
        try:
            clip = Clip(np.stack(pictures), points, picture, None if picture is None else own)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if len(clip.frames) < least:
            raise ValueError(f"{place} has {len(clip.frames)} frames; expected {least} or more")
        found.append(clip)
    if not found:
        raise ValueError(f"{folder} holds no clips; expected folders with frames and poses")
    return found


class Batches:
    """Clips with references as a model takes them: latents, drawn poses, features.

    pose_size, pose_width: as :func:`~zoo_generation.unianimate.drawing.draw` takes them.
    """

    def __init__(
        self,
        model: UNet,
        latents: Latents,
        features: Features | None = None,
        *,
        pose_size: tuple[int, int] = SIZE,
        pose_width: float | None = None,
    ) -> None:
        self.names, self.latents, self.features = model.video_compositions, latents, features
        self.pose_size, self.pose_width = pose_size, pose_width
        if "image" in self.names and features is None:
            raise ValueError("the model has the condition image; give features, which make it")

    def of(self, clips: Sequence[Clip]) -> Batch:
        """All of one length and size, each with a reference."""
        count = len(clips[0].frames)
        video = torch.stack([self._latent(c.frames) for c in clips])
        given: dict[str, Tensor | None] = {}
        references = [c.reference for c in clips if c.reference is not None]
        if len(references) != len(clips):
            raise ValueError("a clip has no reference; Clip.cut gives it one")
        if "randomref" in self.names:
            own = torch.stack([self._latent(picture[None]) for picture in references])
            given["randomref"] = own.expand(-1, -1, count, -1, -1)
        if "dwpose" in self.names:
            given["dwpose"] = torch.stack([self._drawn(c) for c in clips])
        pictures = torch.stack([_floats(picture[None])[0] for picture in references])
        if "local_image" in self.names:
            first = torch.stack([_floats(c.frames[:1])[0] for c in clips])
            given["local_image"] = first[:, :, None].expand(-1, -1, count, -1, -1)
        if "image" in self.names:
            assert self.features is not None
            given["image"] = self.features.picture(pictures)
        return Batch(video, given)

    def _latent(self, frames: np.ndarray) -> Tensor:
        """(frames, H, W, 3) to (4, frames, h, w)."""
        return self.latents.encode(2 * _floats(frames) - 1).transpose(0, 1)

    def _drawn(self, clip: Clip) -> Tensor:
        """(3, frames + 1, H, W), the reference's pose in front where the model wants it."""
        pictures = draw(clip.poses, self.pose_size, width=self.pose_width)
        if "randomref_pose" in self.names:
            assert clip.reference_pose is not None
            pictures = np.concatenate([draw(clip.reference_pose, self.pose_size, width=self.pose_width), pictures])
        return _floats(pictures).transpose(0, 1)


def _floats(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in uint8, the mean over the frames of (frames, H, W, 3)."""
    error = ((found.astype(float) - expected.astype(float)) ** 2).reshape(len(found), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-2))))
