"""The zoo's U-Mamba in nnU-Net v2: planning, data, augmentation, losses and inference stay nnU-Net's own.

    export nnUNet_extTrainer=$PWD/examples/nnunet
    nnUNetv2_train 1 3d_fullres 0 -tr nnUNetTrainerZooUMambaEnc

Run with nnunetv2 2.8.1, whose trainers build networks from plans. Not for clinical use.
"""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from zoo_medical.nnunet import umamba_from_plans


class nnUNetTrainerZooUMambaEnc(nnUNetTrainer):
    """nnU-Net with a Mamba layer after every stage of the encoder."""

    mamba = "enc"

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        return umamba_from_plans(
            configuration_manager.network_arch_init_kwargs, configuration_manager.patch_size,
            num_input_channels, num_output_channels, mamba=cls.mamba, deep_supervision=enable_deep_supervision,
        )  # fmt: skip

    def set_deep_supervision_enabled(self, enabled):
        network = self.network.module if self.is_ddp else self.network
        network = getattr(network, "_orig_mod", network)  # compiled
        network.deep_supervision = enabled


class nnUNetTrainerZooUMambaBot(nnUNetTrainerZooUMambaEnc):
    """nnU-Net with one Mamba layer at the bottom."""

    mamba = "bot"
