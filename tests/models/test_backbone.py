"""The backbone against torchvision's own models, and the loading of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from samdetr.errors import CheckpointError
from samdetr.models.backbone import Backbone, load_backbone_weights


@pytest.mark.parametrize(("name", "dilation"), [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_features_equal_torchvision(name: str, dilation: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, replace_stride_with_dilation=[False, False, dilation]).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    images = torch.randn(1, 3, 97, 130)
    parts = list(theirs.children())[:-2]
    wanted = [torch.nn.Sequential(*parts[:count])(images) for count in range(len(parts) - 2, len(parts) + 1)]
    for norm in ("frozen", "batch"):
        for levels in (1, 3):
            ours = Backbone(name=name, norm=norm, dilation=dilation, levels=levels).eval()
            load_backbone_weights(ours, str(tmp_path / "weights.pth"))
            got = ours(images, torch.tensor([[97, 130]]))
            assert ours.channels == tuple(one.shape[1] for one in wanted[-levels:])
            assert ours.strides == (8, 16, 16 if dilation else 32)[-levels:]
            for one, other in zip(got, wanted[-levels:], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize(("frozen_stages", "expected"), [(0, set()), (1, {"conv1"}), (2, {"conv1", "layer1"})])
def test_frozen_stages(frozen_stages: int, expected: set[str]) -> None:
    backbone = Backbone(name="resnet18", frozen_stages=frozen_stages)
    frozen = {name.split(".")[0] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == expected


def test_safetensors_and_fewer_stages(tmp_path: Path) -> None:
    whole = torchvision.models.resnet18()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    backbone = Backbone(name="resnet18", norm="batch", stages=3)
    load_backbone_weights(backbone, str(tmp_path / "w.safetensors"))
    assert torch.equal(backbone.state_dict()["layer3.1.conv2.weight"], whole.layer3[1].conv2.weight)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv3\.weight is missing.*more"):
        load_backbone_weights(Backbone(name="resnet50"), str(tmp_path / "r18.pth"))
    with pytest.raises(CheckpointError, match=r"conv1\.weight is \[64, 3, 7, 7\], the model needs \[32, 3, 7, 7\]"):
        load_backbone_weights(Backbone(name="resnet18", width=32), str(tmp_path / "r18.pth"))
    with pytest.raises(CheckpointError, match="there is no file"):
        load_backbone_weights(Backbone(name="resnet18"), str(tmp_path / "absent.pth"))
    (tmp_path / "broken.pth").write_bytes(b"???")
    with pytest.raises(CheckpointError, match=r"cannot read the backbone weights .*broken\.pth"):
        load_backbone_weights(Backbone(name="resnet18"), str(tmp_path / "broken.pth"))


def test_no_network_says_which_file_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(CheckpointError, match=r"resnet50-0676ba61\.pth") as caught:
        load_backbone_weights(Backbone(name="resnet50"), "imagenet")
    assert str(tmp_path / "checkpoints" / "resnet50-0676ba61.pth") in str(caught.value)
    assert "https://download.pytorch.org" in str(caught.value)


def test_live_batch_norm_of_a_frozen_stage_does_not_drift() -> None:
    backbone = Backbone(name="resnet18", norm="batch", frozen_stages=2, stages=2, width=8).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 64, 64), torch.tensor([[64, 64]] * 2))
    moved = {key.split(".")[0] for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"layer2"}
