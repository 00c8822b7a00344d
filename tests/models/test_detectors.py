"""Detectors: their body is what their own forward computes, and a pruned body put back finds what it must find."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hazards import Hazard, conv, healthy
from oracle import distance, floats, plan_of, removed_units, scale, zeroed
from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.couple import couple
from paredown.detectors import detector_body, is_detector
from paredown.errors import MissingError, RejectedError
from paredown.examine import examine
from paredown.models import import_torchvision, load_model
from paredown.program import capture
from paredown.prune import prune
from paredown.score import score

try:
    import_torchvision()
except MissingError:
    pytest.skip("torchvision is not installed", allow_module_level=True)
from torchvision.extension import _has_ops
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

WHOLE = _has_ops()
"""Whether torchvision's own operators (nms, roi_align) are there: without them a detector stops after its heads."""
SIZE = {"min_size": 32, "max_size": 32}


class Two(nn.Module):
    """A backbone with two maps."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.out_channels = channels
        self.stem = nn.Sequential(conv(3, 6, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.one, self.two = conv(6, channels, stride=2), conv(channels, channels, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = self.one(self.stem(x))
        return OrderedDict([("0", one), ("1", self.two(one.relu()))])


def anchors(ratios: int = 3) -> AnchorGenerator:
    return AnchorGenerator(((8,), (16,)), ((0.5, 1.0, 2.0)[:ratios],) * 2)


def pool(size: int) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(["0", "1"], size, 2)


def representation() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU())


def r_cnn(kind: Any, **options: Any) -> nn.Module:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    return kind(
        Two(),
        rpn_anchor_generator=anchors(),
        box_roi_pool=pool(2),
        box_head=representation(),
        box_predictor=FastRCNNPredictor(5, 4),
        box_detections_per_img=6,
        rpn_post_nms_top_n_test=20,
        box_score_thresh=0.0,
        **SIZE,
        **options,
    )


def two_lists() -> nn.Module:
    """SSD wants the channels of each map."""
    backbone = Two()
    backbone.out_channels = [8, 8]  # type: ignore[assignment]
    return backbone


class Logits(nn.Sequential):
    """A last convolution under the name that torchvision looks for."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.add_module("mask_fcn_logits", conv(channels, 4, 1, **options))


BUILT = {
    "retinanet": lambda: RetinaNet(
        Two(), 4, anchor_generator=anchors(), detections_per_img=6, score_thresh=0.0, **SIZE
    ),
    "fcos": lambda: FCOS(Two(32), 4, anchor_generator=anchors(1), detections_per_img=6, score_thresh=0.0, **SIZE),
    "ssd": lambda: SSD(
        two_lists(), DefaultBoxGenerator([[2], [2]]), (32, 32), 4, detections_per_img=6, score_thresh=0.0
    ),
    "faster": lambda: r_cnn(FasterRCNN),
    "mask": lambda: r_cnn(MaskRCNN, mask_roi_pool=pool(4), mask_head=conv(8, 6), mask_predictor=Logits(6)),
    "keypoint": lambda: r_cnn(
        KeypointRCNN,
        keypoint_roi_pool=pool(4),
        keypoint_head=conv(8, 6),
        keypoint_predictor=conv(6, 3),
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return healthy(BUILT[name]()).eval()


def images() -> list[Tensor]:
    return list(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


def found(detector: nn.Module) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return detector(images())  # type: ignore[no-any-return]


def overheard(detector: nn.Module) -> tuple[Tensor, list[Any]]:
    """What the backbone saw and the (first stage's) head said while the detector ran as a whole."""
    seen: list[Tensor] = []
    said: list[Any] = []
    head: nn.Module = detector.head if hasattr(detector, "head") else detector.rpn.head  # type: ignore[assignment,union-attr]
    hooks = [
        detector.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0])),  # type: ignore[union-attr]
        head.register_forward_hook(lambda _, args, out: said.append(out)),
    ]
    try:
        found(detector)
    except RuntimeError:
        assert not WHOLE
    for hook in hooks:
        hook.remove()
    return seen[0], said


def agree(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.allclose(a[k], b[k], atol=1e-4) for k in a)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", BUILT)
def test_the_body_says_what_the_head_says_inside_the_detector(name: str) -> None:
    detector = made(name)
    batch, said = overheard(detector)
    body = detector_body(detector)
    with torch.no_grad():
        out = body(batch)
    if isinstance(said[0], dict):
        assert out.keys() == said[0].keys()
        assert all(torch.equal(out[k], said[0][k]) for k in out)
    else:
        for key, maps in zip(("objectness", "pred_bbox_deltas"), said[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(out[key], maps, strict=True))
    assert {n for n, _ in body.named_parameters()} == {n for n, _ in detector.named_parameters()}


@pytest.mark.parametrize("name", BUILT)
def test_a_pruned_body_put_back_says_what_the_detector_says_without_those_channels(name: str) -> None:
    detector = made(name)
    batch, before = overheard(detector)
    assert distance(floats(overheard(detector_body(detector).joined(detector))[1]), floats(before)) == 0
    program = capture(detector_body(detector), batch, train=False)
    coupling = couple(program)
    assert coupling.free_units >= 6 + 8  # stem, maps, and what is inside the heads
    removed = removed_units(coupling, seed=0)
    pruned = prune(program, plan_of(program, coupling, removed))
    assert pruned.realiser == "module"
    small = pruned.module.joined(detector)  # type: ignore[operator]
    oracle = zeroed(detector, coupling, removed, Hazard(build=lambda: detector, inputs=lambda b: ((images(),), {})))
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in detector.parameters())
    for left, right, dense in (
        (overheard(small)[1], overheard(oracle)[1], before),
        *[(detector_body(m)(batch) for m in (small, oracle, detector))],
    ):
        got, expected, whole = floats(left), floats(right), floats(dense)
        assert distance(got, expected) <= 1e-5 * scale(whole)
        assert distance(expected, whole) > 1e-2 * scale(whole)
    if WHOLE:
        boxes = found(oracle)
        assert sum(len(d["boxes"]) for d in boxes) > 0
        assert agree(found(small), boxes)
        assert not agree(boxes, found(detector))


def test_what_is_no_detector_is_refused() -> None:
    assert not is_detector(nn.Sequential(conv(3, 4)))
    with pytest.raises(RejectedError, match="backbone and head"):
        detector_body(nn.Sequential(conv(3, 4)))
    with pytest.raises(RejectedError, match="of the kind that the body came from"):
        detector_body(made("retinanet")).joined(made("faster"))


REAL = (
    "ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "retinanet_resnet50_fpn", "fcos_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_torchvisions_detectors_lose_30_and_60_percent_of_their_channels(name: str) -> None:
    body, _ = load_model(f"torchvision:{name}")
    side = 300 if name == "ssd300_vgg16" else 64  # its last convolutions are not padded
    program = capture(body, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)), train=False)
    coupling = couple(program)
    assert not coupling.unknown_ops
    cost, scores = examine(program), score(program, coupling, "l1")
    sizes = [sum(p.numel() for p in body.parameters())]
    for remain in (0.7, 0.4):
        plan = allocate(coupling, scores, cost, Budget(channels=remain), align=1, floor=0.0)
        pruned = prune(program, plan)
        assert pruned.proof.max_error <= 1e-4 * pruned.proof.scale
        assert pruned.proof.moved > 1e-3 * pruned.proof.scale
        sizes.append(sum(p.numel() for p in pruned.module.parameters()))
    assert sizes[1] < 0.75 * sizes[0]
    assert sizes[2] < 0.4 * sizes[0]


def test_the_body_of_a_copy_is_its_own() -> None:
    detector = made("retinanet")
    body = copy.deepcopy(detector_body(detector))
    with torch.no_grad():
        next(body.parameters()).zero_()
    assert bool(next(detector.parameters()).any())
