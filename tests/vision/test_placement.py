"""Image models over the CPU and the disk give the same answers."""

from __future__ import annotations

import pytest
import torch

import zoo

pytest.importorskip("accelerate")


@pytest.mark.parametrize("name", ["vim_micro.digits", "vmamba_micro.digits"])
@pytest.mark.parametrize("plan", ["disk", "auto"])
def test_the_same_answer_from_the_disk(name: str, plan: str, tmp_path) -> None:
    whole = zoo.load(name)
    image = torch.rand(2, whole.in_chans if hasattr(whole, "in_chans") else 3, 32, 32)
    if hasattr(whole, "img_size"):
        image = image[..., : whole.img_size[0], : whole.img_size[1]]
    options = {"device_map": {"": "disk"}} if plan == "disk" else {"device_map": "auto", "max_memory": {"cpu": "200KB"}}
    model = zoo.load(name, offload_folder=tmp_path, **options)
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        found = model(image)
        torch.testing.assert_close(found, whole(image), rtol=1e-5, atol=1e-5)
        for (
            part
        ) in whole.modules():  # hooks fetch an offloaded layer's weights, and layers that are watched are not fused
            part.register_forward_hook(lambda *_: None)
        assert torch.equal(found, whole(image))
    assert zoo.pipeline(model).device == torch.device("cpu")
