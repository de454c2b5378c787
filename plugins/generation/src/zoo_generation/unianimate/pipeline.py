"""A picture of a person and a sequence of poses in, a video of that person out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.pipelines import Pipeline, Result
from zoo_registry import errors

from . import diffusion, media
from .drawing import SIZE, draw
from .encoders import ClipFeatures, Detector, DWPose, Features, Latents, latents_of
from .poses import EXTENSIONS, Poses, align, read_poses
from .unet import UNet


@dataclass(kw_only=True)
class Animation(Result):
    """The video. :meth:`save` writes it as .gif, .webp, .mp4 (with imageio), .npz or a strip of frames (.png)."""

    frames: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8), repr=False)
    fps: float = 8.0
    notes: list[str] = field(default_factory=list)  #: what was left out or assumed

    def summary(self) -> str:
        count, height, width = self.frames.shape[:3]
        return f"{count} frames of {width} x {height}, {count / self.fps:.1f} s"

    def picture(self) -> Image.Image:
        return media.strip(self.frames)

    def save(self, path: str | Path, scale: int = 1) -> Path:
        """Write the video; scale: every pixel so many times."""
        return media.write_frames(self.frames, path, self.fps, scale)

    def save_picture(self, path: str | Path) -> Path:
        return self.save(path)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  note: {note}" for note in self.notes)])


class Sample(NamedTuple):
    picture: Image.Image
    poses: np.ndarray | None  #: (frames, H, W, 3) drawn
    reference: np.ndarray | None  #: (H, W, 3) drawn
    notes: list[str]


class HumanAnimation(Pipeline):
    """``pipe(("person.png", "poses.npz"))``: the person of the picture, moving as the poses do.

    The second file holds key points (.npz, .json: :func:`~zoo_generation.unianimate.poses.read_poses`), is a folder of
    drawn poses with ``ref_pose.jpg`` as the original's script writes it, or, with a detector, an animation or video of
    somebody who moves. The reference's own pose comes from the file or the detector.

    frames: at most so many (None: all). every: one of so many frames is taken. steps, guidance: of the sampling. seed:
    of its noise. first_frame: the video begins with the picture (condition ``local_image``) instead of being about the
    person in it (``randomref``). aligned: poses are given the reference's build. prior: the step whose noise the
    reference gets at the start (None: 949, 939 for videos longer than a window; -1: noise alone). size, overlap:
    windows of longer videos, in frames. fps: of the answer. autoencoder, clip: where Stable Diffusion's autoencoder and
    OpenCLIP are, for models that need them. detector, pose: ``yolox_l.onnx`` and ``dw-ll_ucoco_384.onnx``. latents
    ("autoencoder", "patch"), pose_size and pose_width (of drawn poses, in pixels): how the model was trained, where
    its card does not say.
    """

    task = "human-animation"
    extensions = (*media.PICTURES, *EXTENSIONS)
    files_per_sample = 2

    def __init__(
        self,
        model: nn.Module,
        frames: int | None = None,
        every: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        first_frame: bool = False,
        aligned: bool | None = None,
        prior: int | None = None,
        size: int | None = None,
        overlap: int | None = None,
        fps: float | None = None,
        autoencoder: str | Path | Latents | None = None,
        clip: str | Path | Features | None = None,
        detector: str | Path | Detector | None = None,
        pose: str | Path | None = None,
        latents: str | None = None,
        pose_size: Sequence[int] | None = None,
        pose_width: float | None = None,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, UNet):
            raise ValueError(f"{type(model).__name__} animates nobody; expected a UNet of UniAnimate")
        self.unet, own = model, self.preprocess
        self.steps = int(own.get("steps", 30) if steps is None else steps)
        self.guidance = float(own.get("guidance", diffusion.GUIDANCE) if guidance is None else guidance)
        self.size = int(own.get("window", 32) if size is None else size)
        self.overlap = int(own.get("overlap", 8) if overlap is None else overlap)
        self.fps = float(own.get("fps", 8) if fps is None else fps)
        self.aligned = bool(own.get("aligned", True) if aligned is None else aligned)
        drawn = own.get("pose_size", SIZE) if pose_size is None else pose_size
        if isinstance(drawn, (int, str)) or len(drawn) != 2 or min(drawn) < 1:
            raise ValueError(f"pose_size is {drawn!r}; expected width and height in pixels, as [512, 768]")
        self.pose_size = (int(drawn[0]), int(drawn[1]))
        self.pose_width = own.get("pose_width") if pose_width is None else pose_width
        self.frames, self.every, self.seed = frames, int(every), int(seed)
        self.first_frame = bool(first_frame)
        self.prior = own.get("prior") if prior is None and steps is None else prior  # a card's goes with its steps
        self.schedule = diffusion.Schedule()
        diffusion.timesteps(self.steps)
        diffusion.windows(1, self.size, self.overlap)
        if self.every < 1 or (frames is not None and frames < 1):
            raise ValueError(f"frames is {frames} and every {every}; expected 1 or more of each")
        if not (self.fps > 0 and np.isfinite(self.guidance)):
            raise ValueError(f"fps is {self.fps} and guidance {self.guidance}; expected above 0, and a finite number")
        if self.prior is not None and not -1 <= self.prior < diffusion.STEPS:
            raise ValueError(f"prior is {self.prior}; expected -1 for noise alone, or 0 to {diffusion.STEPS - 1}")
        if self.first_frame and "local_image" not in model.video_compositions:
            raise ValueError("first_frame=True needs a model with the condition local_image; this one has none")
        given = not isinstance(autoencoder, (str, Path, type(None)))
        where: Any = None if given else autoencoder
        kind: Any = autoencoder if given else latents or own.get("latents", "autoencoder")
        self.latents = latents_of(kind, where)
        self.features = self._features(clip)
        self.detector = self._detector(detector, pose)

    def _features(self, clip: str | Path | Features | None) -> Features | None:
        if "image" not in self.unet.video_compositions:
            return None
        if clip is None:
            raise errors.BadArgument(
                "this model reads features of OpenCLIP ViT-H/14, and none was given; give clip=FOLDER with its weights "
                "in the format of transformers",
                argument="clip",
                accepted=[],
            )
        return ClipFeatures(clip) if isinstance(clip, (str, Path)) else clip

    @staticmethod
    def _detector(detector: str | Path | Detector | None, pose: str | Path | None) -> Detector | None:
        if detector is None and pose is not None:
            raise ValueError("pose is given without detector; expected yolox_l.onnx and dw-ll_ucoco_384.onnx")
        if not isinstance(detector, (str, Path)):
            return detector
        if pose is None:
            raise ValueError("detector is given without pose; expected yolox_l.onnx and dw-ll_ucoco_384.onnx")
        return DWPose(detector, pose)

    # -- files

    def read(self, source: Any) -> Sample:
        if not isinstance(source, tuple) or len(source) != 2:
            raise ValueError(f"{source!r:.80} is given; expected a pair, (picture of a person, poses)")
        picture, (poses, reference, notes) = media.read_picture(source[0]), self._poses(source[1])
        if isinstance(poses, np.ndarray):
            return Sample(picture, self._chosen(poses), reference, notes)
        poses = poses[np.arange(len(poses))[:: self.every][: self.frames]]
        if reference is None and self.detector is not None:
            reference = self.detector([np.asarray(picture)])
        if reference is None and not self.first_frame and "randomref_pose" in self.unet.video_compositions:
            raise ValueError(
                f"{source[1]} has no pose of the person in {source[0]}; add it (reference_body ... in an npz, "
                "'reference' in JSON), or give detector= and pose="
            )
        if self.aligned and reference is not None:
            poses = align(poses, reference)
        kind: dict[str, Any] = {"size": self.pose_size, "width": self.pose_width}
        own = None if reference is None else draw(reference, **kind)[0]
        return Sample(picture, draw(poses, **kind), own, [*notes, *poses.notes])

    def _chosen(self, frames: np.ndarray) -> np.ndarray:
        return frames[:: self.every][: self.frames]

    def _poses(self, source: Any) -> tuple[Any, Any, list[str]]:
        """(poses, reference's pose, notes): :class:`Poses`, or arrays where they come drawn."""
        if isinstance(source, Poses):
            return source, None, []
        if isinstance(source, tuple) and len(source) == 2:
            return source[0], source[1], []
        path = Path(source)
        if path.suffix.lower() in EXTENSIONS:
            return *read_poses(path), []
        if path.is_dir() and (path / media.POSE_OF_REFERENCE).exists():
            drawn = np.stack([np.asarray(f.resize(self.pose_size)) for f in media.read_frames(path)])
            own = media.read_picture(path / media.POSE_OF_REFERENCE).resize(self.pose_size)
            return drawn, np.asarray(own), []
        if self.detector is None:
            raise ValueError(
                f"{path} holds no key points ({', '.join(EXTENSIONS)}) and is no folder of drawn poses with "
                f"{media.POSE_OF_REFERENCE}; to find poses in a video give detector= and pose="
            )
        return self.detector([np.asarray(f) for f in media.read_frames(path)]), None, []

    def prepare(self, sample: Sample) -> dict[str, Tensor]:
        """picture (3, H, W), poses (3, frames + 1, H, W) with the reference's in front, all in [0, 1]."""
        assert sample.poses is not None
        width, height = self.video_size()
        picture = np.asarray(sample.picture.resize((width, height), Image.Resampling.BILINEAR))
        own = np.zeros_like(sample.poses[0]) if sample.reference is None else sample.reference
        drawn = np.concatenate([own[None], sample.poses])
        return {
            "picture": torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255,
            "features": torch.from_numpy(np.asarray(sample.picture).copy()).permute(2, 0, 1).float() / 255,
            "poses": torch.from_numpy(drawn).permute(3, 0, 1, 2).float() / 255,
        }

    def video_size(self) -> tuple[int, int]:
        """Width and height of the answer in pixels."""
        width, height = ((((n // 2) + 1) // 2 + 1) // 2 for n in self.unet.resolution)
        return width * self.latents.side, height * self.latents.side

    # -- computing

    def collate(self, samples: Sequence[Any]) -> Any:
        return list(samples)  # pictures may be of any size; videos are made one by one

    def forward(self, batch: Any) -> list[Tensor]:
        return [self.animate(**sample) for sample in batch]

    def split(self, output: Any, count: int) -> list[Any]:
        return list(output)

    @torch.no_grad()
    def animate(self, picture: Tensor, features: Tensor, poses: Tensor) -> Tensor:
        """What :meth:`prepare` gave to the video, (frames, 3, H, W) in [0, 1]."""
        model, frames = self.unet, poses.shape[1] - 1
        kind = {"device": self.device, "dtype": self.dtype}
        picture, poses = picture[None].to(**kind), poses[None].to(**kind)  # type: ignore[call-overload]
        latent = self.latents.encode(2 * picture - 1).to(**kind)  # type: ignore[call-overload]
        latent = latent[:, :, None].expand(-1, -1, frames, -1, -1)
        given: dict[str, Tensor | None] = {"dwpose": poses if "dwpose" in model.video_compositions else None}
        zero_y = None
        if "randomref_pose" not in model.video_compositions and given["dwpose"] is not None:
            given["dwpose"] = poses[:, :, 1:]
        if self.features is not None:
            given["image"] = self.features.picture(features[None].float()).to(**kind)  # type: ignore[call-overload]
            zero_y = self.features.prompt().to(**kind)  # type: ignore[call-overload]
        if self.first_frame:
            given["local_image"] = picture[:, :, None].expand(-1, -1, frames, -1, -1)
        else:
            given["randomref"] = latent
        noise = diffusion.starting_noise(
            self.schedule,
            latent.cpu().float(),
            prior=self._prior(frames),
            generator=torch.Generator().manual_seed(self.seed),
        )
        z = diffusion.sample(
            model,
            noise.to(self.device),
            given,
            schedule=self.schedule,
            count=self.steps,
            guidance=self.guidance,
            size=self.size,
            overlap=self.overlap,
            zero_y=zero_y,
        )
        video = self.latents.decode(z.to(self.dtype).transpose(1, 2).flatten(0, 1))
        return (video.float() * 0.5 + 0.5).clamp(0, 1)

    def _prior(self, frames: int) -> int | None:
        if self.prior is not None:
            return None if self.prior < 0 else self.prior
        return diffusion.PRIOR if frames <= self.size else diffusion.PRIOR_LONG

    def finish(self, output: Tensor, sample: Sample) -> Animation:
        pixels = (output * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return Animation(frames=pixels, fps=self.fps, notes=sample.notes)
