"""All of torchvision's classifiers and segmentation models with 30 % and 60 % of every space removed.

The proof holds, the user's own class agrees, and the parameters go.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from hazards import Hazard, healthy
from hazards_tokens import mend_torchvision
from oracle import distance, plan_of, removed_units, run, scale, zeroed
from paredown.couple import couple
from paredown.program import capture
from paredown.prune import prune

pytest.importorskip("safetensors")
pytestmark = pytest.mark.slow


def names(module: str = "") -> list[str]:
    try:
        mend_torchvision()
        from torchvision import models
    except (ImportError, RuntimeError):
        return []
    return sorted(n for n in models.list_models(module=getattr(models, module) if module else models))


def side(name: str) -> int:
    """The smallest image that the architecture takes."""
    if name.startswith("inception"):
        return 96
    if name.startswith(("vit_h",)):
        return 28
    if name.startswith("vit"):
        return 32
    if name.startswith(("alexnet", "squeezenet", "vgg", "maxvit")):
        return 64 if not name.startswith("maxvit") else 224
    return 64


def options(name: str) -> dict[str, Any]:
    wanted: dict[str, Any] = {"num_classes": 10}
    if name in names("segmentation"):
        wanted["weights_backbone"] = None
    if name.startswith("vit"):
        wanted["image_size"] = side(name)
    if name.startswith(("googlenet", "inception")):
        wanted |= {"aux_logits": False, "init_weights": False}
    return wanted


def build(name: str) -> nn.Module:
    from torchvision import models

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.get_model(name, weights=None, **options(name)).eval()


@pytest.mark.parametrize("name", [*names(), *names("segmentation")])
def test_a_model_loses_channels_and_is_proven(name: str, record_property: Any) -> None:
    model = healthy(build(name))
    x = torch.randn(2, 3, side(name), side(name), generator=torch.Generator().manual_seed(0))
    program = capture(model, x, train=False)
    assert program.batch == "dynamic"
    coupling = couple(program)
    assert not coupling.unknown_ops
    before = sum(p.numel() for p in model.parameters())
    for share, least in ((0.3, 0.35), (0.6, 0.6)):
        removed = removed_units(coupling, 0, share=share)
        pruned = prune(program, plan_of(program, coupling, removed))
        gone = 1 - sum(p.numel() for p in pruned.module.parameters()) / before
        proof = pruned.proof
        record_property(f"{share:.0%}", (round(gone, 4), pruned.realiser, proof.max_error / proof.scale))
        print(f"{name}: {gone:.1%} of {before:,} parameters removed, {pruned.realiser}, {coupling.pinned_units} pinned")
        assert proof.max_error <= 1e-4 * proof.scale
        assert proof.moved > 1e-3 * proof.scale
        assert gone > least, [(p.reason, p.units, p.where) for p in coupling.pinned]
        _agrees_with_the_users_class(model, pruned.module, coupling, removed, x[:1])


def _agrees_with_the_users_class(
    model: nn.Module, small: nn.Module, coupling: Any, removed: Any, x: torch.Tensor
) -> None:
    """The independent oracle, on one sample; in double where float32 is too coarse for a deep net of random weights."""
    hazard = Hazard(build=lambda: model, inputs=lambda b: ((x,), {}))
    oracle = zeroed(model, coupling, removed, hazard)
    dense, expected, got = (run(m, ((x,), {})) for m in (model, oracle, small))
    assert math.isfinite(scale(dense))
    if distance(got, expected) > 1e-4 * scale(dense):
        y = x.double()
        expected, got = run(oracle.double(), ((y,), {})), run(small.double(), ((y,), {}))
        assert distance(got, expected) <= 1e-9 * scale(expected)
    assert distance(run(model.to(x.dtype), ((x,), {})), [t.float() for t in expected]) > 1e-3 * scale(dense)


def test_the_list_is_torchvisions() -> None:
    if not names():
        pytest.skip("torchvision is missing")
    assert len(names()) == 80
    assert len(names("segmentation")) == 6
