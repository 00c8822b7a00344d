"""Calibration data of another kind than what the network sees: told by its batch norms, by pixels, and by what trains and evaluates it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.program import capture
from paredown.quantize import quantize, train_quantized
from paredown.quantize.culprits import spare
from paredown.quantize.ranges import ANOTHER_RANGE, beside_training


def seen(kind: type[nn.Module] = nn.BatchNorm2d) -> tuple[nn.Module, Tensor]:
    """A network whose batch norm has seen 256 samples, and these."""
    torch.manual_seed(0)
    if kind is nn.BatchNorm1d:
        x = torch.randn(256, 6) * 3 + 5
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 2))
    else:
        x = torch.rand(256, 3, 8, 8)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2)
        )
    net.train()
    with torch.no_grad():
        net(x)
    return net.eval(), x


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_batch_norm_remembers_the_range_of_its_training_data(kind: type[nn.Module]) -> None:
    net, x = seen(kind)
    program = capture(net, x[:2])
    assert beside_training(program, ((x[:64],), {})) == ""
    for scaled in (255.0, 10.0):
        y = x[:64] * scaled
        (said,) = [n for n in quantize(program, calibrate=[y]).notes if "another range" in n]
        # An oracle of its own: what reaches the module, against the statistics that it holds.
        read = net[0](y).movedim(1, 0).flatten(1)  # type: ignore[index]
        norm: Any = net[1]  # type: ignore[index]
        times = ((read - norm.running_mean[:, None]).square().mean(1) / norm.running_var).median().sqrt()
        assert times > ANOTHER_RANGE
        assert f"batch norm 1 reads are {float(times):.3g} times" in said
    assert not any("another range" in n for n in quantize(program, calibrate=[x[:64]]).notes)


def test_a_batch_norm_that_has_seen_nothing_says_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).eval()
    assert beside_training(capture(net, torch.zeros(2, 3, 8, 8)), ((torch.rand(8, 3, 8, 8) * 255,), {})) == ""
    assert beside_training(capture(nn.Linear(4, 2), torch.zeros(2, 4)), ((torch.randn(8, 4) * 1e6,), {})) == ""


@pytest.mark.parametrize("bias", [True, False])
def test_channels_of_zeros_say_nothing_of_the_range(bias: bool) -> None:
    """Most filters of the first layer pruned, as at high sparsity: what is constant in training and here has no range to compare."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(1, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        net[0].weight[:5] = 0  # type: ignore[index]
        for _ in range(200):
            net(x)
    program = capture(net.eval(), x[:2], train=False)
    assert beside_training(program, ((x,), {})) == ""
    assert "of another range" in beside_training(program, ((255 * x,), {}))


@pytest.mark.parametrize("steps", [1, 10, 30])
def test_statistics_that_still_hold_of_their_start_are_no_other_range(steps: int) -> None:
    """Small inputs and few steps: the running variance still is mostly the 1 that it began with."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 0.02 * torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        for _ in range(steps):
            net(x)
    program = capture(net.eval(), x[:2], train=False)
    assert beside_training(program, ((x,), {})) == ""
    assert "of another range" in beside_training(program, ((5000 * x,), {}))


def test_whole_numbers_up_to_255_are_raw_pixels_where_they_are_pictures() -> None:
    pictures = torch.randint(0, 256, (40, 3, 6, 6)).float()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    said = quantize(capture(net, pictures[:2]), calibrate=[pictures[:20], pictures[20:]]).notes
    assert any("whole numbers from 0 to 255" in n for n in said)
    for other in ([pictures / 255], [pictures[:20], pictures[20:] + 0.5], [pictures - 128]):
        assert not any("whole numbers" in n for n in quantize(capture(net, pictures[:2]), calibrate=other).notes)
    rows = torch.randint(0, 256, (40, 6)).float()
    assert not any("whole numbers" in n for n in quantize(capture(nn.Linear(6, 2), rows[:2]), calibrate=[rows]).notes)


def test_training_data_of_another_range_are_told() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(64, 6)
    step = lambda model, batch: model(batch).square().mean()  # noqa: E731
    for scale, odd in ((1.0, False), (255.0, True)):
        made = train_quantized(
            capture(net, x[:2]), lambda scale=scale: [x / scale] * 2, step=step, calibrate=[x], epochs=1, lr=1e-4
        )
        said = [n for n in made.notes if "those of the training in" in n]
        assert bool(said) == odd, made.notes
    assert said[0].startswith("calibration inputs lie in [") and "normalise both" in said[0]


def test_what_chooses_layers_and_has_another_range_is_told() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(64, 6)
    for scale, odd in ((1.0, False), (255.0, True)):
        evaluate = lambda predict, scale=scale: float(predict(x / scale).sum())  # noqa: E731
        found = spare(capture(net, x[:2]), evaluate=evaluate, meets=lambda _: True, calibrate=[x])
        assert any("those that evaluate gives in" in n for n in found.quantized.notes) == odd
