"""Robustness: accuracy under Gaussian noise, blur and JPEG, dense, pruned, and an equal dense network."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from paredown.recipes import digits
from talk import draw, nets
from talk.page import Column, Page, Setting, Spread, Table, over_seeds

STRENGTHS: Mapping[str, tuple[float, float, float]] = {
    "Gaussian noise, σ": (0.1, 0.2, 0.4),
    "blur, σ in pixels": (0.5, 0.8, 1.2),
    "JPEG, quality": (50, 20, 5),
}
NETS = {
    "dense": nets.dense,
    "half of the channels": lambda s, seed: nets.halved(s, seed).module,
    "equal dense network": nets.thin,
}


def gaussian(images: Tensor, sigma: float) -> Tensor:
    """Additive noise, clipped to 0…1; seeded."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).clamp(0, 1)


def blur(images: Tensor, sigma: float) -> Tensor:
    """A Gaussian of 5×5 pixels; beyond the border is 0, as the digits have it."""
    x = torch.arange(-2.0, 3.0)
    row = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = torch.outer(row, row) / row.sum() ** 2
    return torch.nn.functional.conv2d(images, kernel[None, None], padding=2)


def jpeg(images: Tensor, quality: float) -> Tensor:
    """Written as JPEG and read again, one image at a time."""
    out = []
    for image in (images[:, 0] * 255).round().byte().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        out.append(np.asarray(Image.open(file), dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(out))[:, None]


WAYS: Mapping[str, Callable[[Tensor, float], Tensor]] = dict(zip(STRENGTHS, (gaussian, blur, jpeg), strict=True))


def build(setting: Setting) -> Page:
    """Nine kinds of noise and none, three networks, several seeds of training."""
    data = {"none": digits.test_batches()}
    for way, strengths in STRENGTHS.items():
        data |= {f"{way} {s:g}": [(WAYS[way](x, s), y) for x, y in digits.test_batches()] for s in strengths}
    found = {name: _accuracies(setting, make, data) for name, make in NETS.items()}
    rows = [(kind, *(over_seeds(found[name][kind]) for name in NETS), *_gains(found, kind)) for kind in data]
    charts = [_chart(way, found) for way in STRENGTHS]
    return Page(
        title="Robustness to noise",
        told=("Removal regularises, can improve the metric, and is said to make the network **more robust to noise**.",),
        parts=(
            *charts,
            Table(
                caption="Accuracy in % on 540 test images, networks in PyTorch, means over seeds. The last columns are paired by seed, in points",
                columns=(
                    Column(title="Noise"), *(Column(title=name, mark="measured", form=".1f") for name in NETS),
                    Column(title="Pruned − dense", mark="measured", form="+.1f"), Column(title="Pruned − equal dense", mark="measured", form="+.1f"),
                ),
                rows=rows,
            ),
        ),
        differ=_findings(rows),
        not_tested=("Larger images; noise that was seen in training; adversarial noise.", "Pruning at other amounts than half of the channels."),
        shortened=f"{len(setting.seeds)} seeds, {nets.base_epochs(setting)} + {nets.recovery_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _accuracies(setting: Setting, make: Callable, data: Mapping[str, list]) -> dict[str, list[float]]:
    trained = [make(setting, seed) for seed in setting.seeds]
    return {kind: [nets.accuracy(net, batches) for net in trained] for kind, batches in data.items()}


def _gains(found: Mapping[str, Mapping[str, list[float]]], kind: str) -> list[Spread]:
    dense, pruned, thin = (np.array(found[name][kind]) for name in NETS)
    return [over_seeds(list(pruned - dense)), over_seeds(list(pruned - thin))]


def _chart(way: str, found: Mapping[str, Mapping[str, list[float]]]) -> draw.Figure:
    kinds = ["none", *(f"{way} {s:g}" for s in STRENGTHS[way])]
    points = {name: [(i, over_seeds(of[kind])) for i, kind in enumerate(kinds)] for name, of in found.items()}
    told = ", ".join(f"{s:g}" for s in STRENGTHS[way])
    return draw.lines(
        points,
        x="strength (0: none)",
        y="accuracy, %",
        caption=f"{way}: {told}. Bars: 95 % intervals over seeds",
        controls=["equal dense network"],
    )


def _shown(gain: Spread) -> str:
    """Whether a gain is one beyond its interval."""
    if gain.low is None or gain.high is None:
        return "cannot be said from one seed"
    return (
        "holds here"
        if gain.low > 0
        else "does not hold here"
        if gain.high < 0
        else "is not shown beyond the interval here"
    )


def _findings(rows: list[tuple]) -> tuple[str, ...]:
    """Counted, not hoped for: an interval that leaves out 0 counts."""
    noisy, clean = rows[1:], rows[0][-2]
    told = [
        f"Without noise the pruned network is {clean.value:+.1f} points from the dense one: that removal improves the metric {_shown(clean)}."
    ]
    for column, against in ((-2, "the dense network"), (-1, "an equal dense network")):
        better = sum(r[column].low is not None and r[column].low > 0 for r in noisy)
        worse = sum(r[column].high is not None and r[column].high < 0 for r in noisy)
        mean = np.mean([r[column].value for r in noisy])
        told.append(
            f"Against {against} the pruned one is better beyond the interval in {better} of {len(noisy)} kinds of noise, and worse in {worse}; {mean:+.1f} points in the mean."
        )
    return (
        *told,
        "Two effects are mixed in “pruned is more robust”: a smaller network, and one that was trained longer with a teacher. The equal dense network, trained as long but without a teacher, tells the size from the rest.",
    )
