"""Pictures and animations in and out: what PIL reads, MP4 through imageio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from zoo import files, images
from zoo_registry import optional

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ANIMATED = (".gif", ".webp", ".apng")
POSE_OF_REFERENCE = "ref_pose.jpg"  #: its name among the drawn poses that the original's script writes


def read_picture(source: Any) -> Image.Image:
    """A path, a PIL picture or an array (H, W, 3) uint8, in RGB. Raises ValueError for what is none."""
    return images.read_picture(source)


def read_frames(path: str | Path) -> list[Image.Image]:
    """A GIF or WebP animation, a video (imageio), or a folder of pictures in the order of their names."""
    path = Path(path)
    if path.is_dir():
        pictures = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURES and f.name != POSE_OF_REFERENCE)
        if not pictures:
            raise ValueError(f"the folder {path} holds no pictures; expected {', '.join(PICTURES)}")
        return [read_picture(f) for f in pictures]
    if path.suffix.lower() in VIDEOS:
        imageio: Any = optional("imageio.v3", f"{path}: a video", "ssm-zoo-generation[video]", otherwise="or use a GIF")
        return [Image.fromarray(np.asarray(frame)[..., :3]) for frame in imageio.imiter(path)]
    try:
        with Image.open(path) as image:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no readable animation ({error})") from error


def write_frames(frames: np.ndarray, path: str | Path, fps: float, scale: int = 1) -> Path:
    """Write (frames, H, W, 3) uint8: .gif, .webp and .apng by PIL, .mp4 by imageio, .npz as an array, any other picture
    as a strip of all frames. scale: every pixel so many times, for small ones."""
    path = Path(path)
    check_ending(path)
    with files.whole(path) as work:
        _write(frames, work, fps, scale)
    return path


def check_ending(path: str | Path) -> None:
    """Raise BadArgument for a name that no animation is written under, and MissingExtra for a video without imageio."""
    kind = Path(path).suffix.lower()
    if kind in VIDEOS:
        optional("imageio.v3", f"{path}: a video", "ssm-zoo-generation[video]", otherwise="or write .gif")
    elif kind != ".npz":
        files.check_ending(path)


def _write(frames: np.ndarray, path: Path, fps: float, scale: int) -> None:
    kind = path.suffix.lower()
    if kind == ".npz":
        np.savez_compressed(path, frames=frames, fps=fps)
        return
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    if kind in ANIMATED:
        first, *rest = [Image.fromarray(f) for f in frames]
        shown: dict[str, Any] = {"lossless": True} if kind == ".webp" else {}
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **shown)
    elif kind in VIDEOS:
        imageio: Any = optional("imageio.v3", f"{path}: a video", "ssm-zoo-generation[video]")
        imageio.imwrite(path, frames, fps=fps)
    else:
        strip(frames).save(path)


def strip(frames: Sequence[np.ndarray] | np.ndarray) -> Image.Image:
    """All frames beside each other, in rows of eight."""
    rows = [np.concatenate(list(frames[i : i + 8]), axis=1) for i in range(0, len(frames), 8)]
    wide = rows[0].shape[1]
    return Image.fromarray(np.concatenate([np.pad(r, ((0, 0), (0, wide - r.shape[1]), (0, 0))) for r in rows]))
