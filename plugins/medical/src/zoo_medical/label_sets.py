"""Names of the labels of public data sets, for networks that were trained on them."""

from __future__ import annotations

from collections.abc import Sequence

from zoo import errors

#: name -> labels in the order of their values, background first
LABEL_SETS: dict[str, tuple[str, ...]] = {
    # BraTS 2023 adult glioma: tumour core is 1 and 3, whole tumour 1 to 3, enhancing tumour 3
    "brats2023": ("background", "necrotic tumour core", "oedema", "enhancing tumour"),
    # BTCV, "Beyond the Cranial Vault", abdomen CT, in the challenge's order
    "btcv": (
        "background", "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
        "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
    ),
    # the eight organs of BTCV that 2D networks report as "Synapse", in TransUNet's order
    "synapse": (
        "background", "aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach",
    ),
    # FLARE 2022, abdomen CT
    "flare22": (
        "background", "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava",
        "right adrenal gland", "left adrenal gland", "gallbladder", "oesophagus", "stomach", "duodenum", "left kidney",
    ),
}  # fmt: skip


def label_names(wanted: str | Sequence[str]) -> list[str]:
    """The labels of a set by name, or the given ones. Raises ``zoo.errors.BadArgument`` for an unknown name."""
    if not isinstance(wanted, str):
        return list(wanted)
    if wanted not in LABEL_SETS:
        raise errors.BadArgument(
            f"label_set is {wanted!r}; expected {', '.join(LABEL_SETS)}, or the labels' names, background first",
            argument="label_set", accepted=list(LABEL_SETS),
        )  # fmt: skip
    return list(LABEL_SETS[wanted])
