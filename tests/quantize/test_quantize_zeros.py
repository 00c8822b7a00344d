"""Layers and channels of zeros: flagged, and before a training with rounding refused or given steps that they can grow on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.errors import RejectedError
from paredown.plan import Mask, Plan
from paredown.program import capture
from paredown.prune import prune
from paredown.quantize import qat, quantize, train_quantized


def zeros_in(net: nn.Module, x: Tensor, **options: Any) -> list[str]:
    return [n for n in quantize(capture(net, x[:2]), calibrate=[x], **options).notes if n.startswith("zeros: ")]


def test_layers_channels_and_batch_norm_scales_of_zero_are_flagged() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()  # fmt: skip
    x = torch.randn(32, 3, 8, 8)
    assert zeros_in(net, x) == []
    with torch.no_grad():
        net[1].weight[:3] = 0  # type: ignore[index]
    assert zeros_in(net, x, repair=["gptq"]) == [
        "zeros: 3 channels of 0.weight have no weight but 0, as after a batch norm with a scale of 0"
    ]
    with torch.no_grad():
        net[3].weight.zero_()  # type: ignore[operator]
        net[3].weight[:, 0, 0, 0] = torch.tensor([1.0] * 4 + [0.5] * 4)  # type: ignore[index]
        net[5].weight.zero_()  # type: ignore[operator]
    assert zeros_in(net, x) == [
        "zeros: all weights of 5.weight are 0: its output does not depend on its input",
        "zeros: 3 channels of 0.weight have no weight but 0, as after a batch norm with a scale of 0",
    ], "1 in 72 weights of 3.weight is not 0"
    with torch.no_grad():
        net[3].weight[1:, 0, 0, 0] = 0  # type: ignore[index]
    assert "zeros: nearly all weights of 3.weight (99.8%) are 0" in zeros_in(net, x)


def learnt(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    step = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    data = list(zip(torch.split(x, 32), torch.split(y, 32), strict=True))
    return train_quantized(capture(net, x[:2]), lambda: data, step=step, calibrate=[x], epochs=8, lr=0.2, **options)


def test_a_layer_of_zeros_is_refused_before_training_and_may_stay_in_float() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(64, 4)
    with torch.no_grad():
        net[2].weight.zero_()  # type: ignore[operator]
    with pytest.raises(RejectedError, match=r"other than 0 to be trained with rounding\. Got only 0 in 2\.weight"):
        learnt(net, x, x)
    made = learnt(net, x, x, float_layers=["2.*"])
    assert "2.weight" not in made.weights


def test_what_a_mask_holds_at_zero_is_not_flagged() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 4)
    kept = np.zeros((4, 8), bool)
    kept[0] = True
    pruned = prune(capture(net, x[:2]), Plan(keep={}, masks={"2.weight": Mask.of(kept, "element")}))
    assert not any(n.startswith("zeros: ") for n in quantize(pruned, calibrate=[x]).notes)
    assert any(
        n.startswith("zeros: 3 channels of 2.weight")
        for n in quantize(capture(pruned.module, x[:2]), calibrate=[x]).notes
    )


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_a_channel_of_zeros_learns_in_training_with_rounding(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times the input is to be learnt; one row starts at 0. Its own step is far too fine for that, and grows by 2 % at most."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4, bias=False)), torch.randn(256, 4)
    with torch.no_grad():
        net[0].weight.copy_(100 * torch.eye(4) + torch.randn(4, 4))  # type: ignore[operator]
        net[0].weight[0] = 0  # type: ignore[index]
    wanted = torch.tensor([100.0, 0.0, 0.0, 0.0])
    rows = []
    for steps in (qat.usable_steps, lambda scales, *_: scales):
        monkeypatch.setattr(qat, "usable_steps", steps)
        made = learnt(net, x, 100 * x, scheme=scheme, clip_norm=None)
        rows.append(float((made.weights["0.weight"].unpack()[0] - wanted).abs().max()))
    assert rows[0] < 20 and rows[1] > 50
