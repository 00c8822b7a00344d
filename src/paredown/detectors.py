"""Detectors up to post-processing: what of a torchvision detector can be captured, and the way back.

A detector's forward resizes lists of images and ends in non-maximum suppression, which branches on values; torch.export
cannot follow either. All that holds weights lies between them: backbone, feature pyramid and heads. `detector_body`
takes that part under the detector's own parameter names, `DetectorBody.joined` puts a pruned one back.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from paredown.errors import RejectedError

_PARTS = ("backbone", "head", "rpn", "roi_heads")


class DetectorBody(nn.Module):
    """Backbone, feature pyramid and heads of a detector; images [N, 3, H, W] to a dict of raw predictions.

    The submodules are the detector's own, so parameters have its names and its weights fit. Where boxes are pooled from
    the pyramid (`roi_heads`), one box is taken from each level: the whole image. Pooling works on every channel by itself,
    so which channels hang together does not depend on the boxes.

    Outputs: of one-stage detectors what their head gives (cls_logits, bbox_regression, …); of two-stage ones objectness
    and pred_bbox_deltas (lists, by level), class_logits and box_regression, mask_logits and keypoint_logits.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        for name in _PARTS:
            part = getattr(detector, name, None)
            if isinstance(part, nn.Module):
                self.add_module(name, part)
        self.training = detector.training

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Raw predictions for a batch of normalised images of one size."""
        parts: Any = self
        features = parts.backbone(images)
        if isinstance(features, Tensor):
            features = OrderedDict([("0", features)])
        if "rpn" not in self._modules:
            return dict(parts.head(list(features.values())))
        objectness, deltas = parts.rpn.head(list(features.values()))
        return {"objectness": objectness, "pred_bbox_deltas": deltas, **_on_boxes(parts.roi_heads, features)}

    def joined(self, detector: nn.Module) -> nn.Module:
        """A copy of the detector with this body in it: lists of images in, boxes out.

        >>> from torchvision.models.detection import fasterrcnn_resnet50_fpn      # doctest: +SKIP
        >>> detector = fasterrcnn_resnet50_fpn()                                  # doctest: +SKIP
        >>> program = pare.capture(detector_body(detector), images)               # doctest: +SKIP
        >>> detector = pare.prune(program, plan).module.joined(detector)          # doctest: +SKIP
        """
        whole = copy.deepcopy(detector)
        body = copy.deepcopy(self)
        for name, part in body._modules.items():
            if not isinstance(getattr(whole, name, None), nn.Module):
                msg = f"the detector must be of the kind that the body came from. Got {type(detector).__name__} without {name!r}."
                raise RejectedError(msg)
            setattr(whole, name, part)
        return whole.train(self.training)


def detector_body(detector: nn.Module) -> DetectorBody:
    """The part of a torchvision detector that can be captured: all its weights, without resizing and post-processing.

    Shares its modules with the detector. Raises RejectedError where the model is not made like torchvision's detectors
    (backbone and head, or backbone, rpn and roi_heads).
    """
    if not is_detector(detector):
        msg = (
            "a detector must have backbone and head (SSD, RetinaNet, FCOS) or backbone, rpn and roi_heads (R-CNN). "
            f"Got {type(detector).__name__} with {', '.join(n for n, _ in detector.named_children()) or 'no parts'}."
        )
        raise RejectedError(msg)
    return DetectorBody(detector)


def is_detector(model: nn.Module) -> bool:
    """Whether a model is made like torchvision's detectors."""
    parts = {n for n in ("backbone", "anchor_generator", *_PARTS) if isinstance(getattr(model, n, None), nn.Module)}
    return parts >= {"backbone", "anchor_generator", "head"} or parts >= {"backbone", "rpn", "roi_heads"}


def _on_boxes(heads: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the second stage says about one box that is the whole image."""
    out = {}
    pooled = _pooled(heads.box_roi_pool, features)
    out["class_logits"], out["box_regression"] = heads.box_predictor(heads.box_head(pooled))
    for kind in ("mask", "keypoint"):
        if getattr(heads, f"{kind}_head", None) is not None:
            pooled = _pooled(getattr(heads, f"{kind}_roi_pool"), features)
            out[f"{kind}_logits"] = getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled))
    return out


def _pooled(pool: Any, features: dict[str, Tensor]) -> Tensor:
    """The levels that a RoI pooling reads, each pooled to its output size, added: shape [N, C, height, width]."""
    height, width = (int(s) for s in pool.output_size)
    maps = [F.adaptive_avg_pool2d(features[n], (height, width)) for n in pool.featmap_names if n in features]
    total = maps[0]
    for one in maps[1:]:
        total = total + one
    return total
