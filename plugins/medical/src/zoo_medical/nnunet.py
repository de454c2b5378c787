"""U-Mamba from nnU-Net's plans, and nnU-Net's checkpoints of it. Needs no nnunetv2: plans are plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .umamba import UMamba
from .umamba_reference import UMambaAdapter


def umamba_from_plans(
    architecture: Mapping[str, Any],
    patch_size: Sequence[int],
    in_chans: int,
    num_classes: int,
    *,
    mamba: str = "enc",
    deep_supervision: bool = True,
) -> UMamba:
    """The U-Mamba ("enc" or "bot") for one configuration of nnU-Net's plans.

    ``architecture``: ``plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]``, of plans for any of
    nnU-Net's U-Nets: stages, features, kernels and strides are read, and ``n_blocks_per_stage`` (residual plans) or
    ``n_conv_per_stage`` as the blocks of a stage, at most 2 as the authors' networks have. ``patch_size``: the
    configuration's own. ``in_chans``, ``num_classes``: as nnU-Net hands them to a trainer.
    Source: arXiv 2401.04722, section 3; ``nnUNetTrainerUMambaEnc`` of bowang-lab/U-Mamba.
    """
    missing = [k for k in ("features_per_stage", "kernel_sizes", "strides") if k not in architecture]
    if missing:
        raise ValueError(
            f"the plans' arch_kwargs have no {', '.join(missing)} (they hold {', '.join(architecture)}); give those of "
            "one of nnU-Net's U-Nets"
        )
    features, kernels, strides = (list(architecture[k]) for k in ("features_per_stage", "kernel_sizes", "strides"))
    blocks = architecture.get("n_blocks_per_stage", architecture.get("n_conv_per_stage", 2))
    decoder = architecture.get("n_conv_per_stage_decoder", 2)
    return UMamba(
        in_chans, num_classes, len(patch_size), mamba, features, kernels, strides,
        _at_most_two(blocks, len(features)), _at_most_two(decoder, len(features) - 1),
        input_size=list(patch_size), deep_supervision=deep_supervision,
    )  # fmt: skip


def read_checkpoint(checkpoint: Mapping[str, Any], model: UMamba) -> dict[str, Tensor]:
    """The state dict for ``model`` in a checkpoint that nnU-Net wrote, of the authors' network or of the zoo's.

    ``checkpoint``: what ``torch.load("checkpoint_final.pth", weights_only=False)`` gives; its key ``network_weights``
    holds the tensors. Load files that you trust only.
    """
    if "network_weights" not in checkpoint:
        raise ValueError(f"the checkpoint has no network_weights (it holds {', '.join(map(str, checkpoint))})")
    state = {k.removeprefix("module."): v for k, v in checkpoint["network_weights"].items()}
    return UMambaAdapter().to_zoo(state, model=model)


def _at_most_two(blocks: int | Sequence[int], stages: int) -> list[int]:
    given = [blocks] * stages if isinstance(blocks, int) else list(blocks)
    return [min(int(b), 2) for b in given]
