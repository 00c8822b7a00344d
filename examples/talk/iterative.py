"""Iterative pruning against one-shot, at the same length of training."""

from __future__ import annotations

import itertools

import numpy as np

import paredown as pare
from paredown.recipes import digits
from talk import draw, nets
from talk.page import Cell, Column, Page, Setting, Table, over_seeds

SCHEDULES = ("one-shot", "iterative", "gradual")


def build(setting: Setting) -> Page:
    """Masks by magnitude across layers, at high sparsity, three schedules, each of equal length."""
    densities = setting.pick((0.08, 0.02), (0.1, 0.05, 0.02))
    lengths = setting.pick((5,), (6, 18))
    rows = [_row(setting, epochs, density) for epochs, density in itertools.product(lengths, densities)]
    dense = over_seeds([nets.accuracy(nets.dense(setting, seed)) for seed in setting.seeds])
    last = rows[-len(densities) :]
    points = {
        s: [(100 * (1 - d), row[2 + i]) for d, row in zip(densities, last, strict=True)]
        for i, s in enumerate(SCHEDULES)
    }
    return Page(
        title="Iterative against one-shot",
        told=("Iterative pruning: prune, train, repeat. It helps at high sparsity.",),
        parts=(
            draw.lines(
                points, x="weights removed, %", y="accuracy, %",
                caption=f"Masks by magnitude across layers, {lengths[-1]} epochs each. Dense: {dense.value:.1f} %. Bars: 95 % intervals over seeds",
            ),
            Table(
                caption=f"Accuracy in % on 540 test images, in PyTorch, means over {len(setting.seeds)} seeds. The rounds of a schedule share its epochs: 5 rounds, the last after 65 % of them",
                columns=(
                    Column(title="Removed"), Column(title="Epochs in all"), *(Column(title=s, mark="measured", form=".2f") for s in SCHEDULES),
                    *(Column(title=f"{s} − one-shot, points", mark="measured", form="+.2f") for s in SCHEDULES[1:]),
                ),
                rows=rows,
            ),
        ),
        differ=(
            _finding("Iterative", rows[-1], -2), _finding("Gradual", rows[-1], -1),
            "The comparison is fair only where both train equally long; iterative pruning is often shown with many times the training of one-shot. Here the rounds share it, and what comes after the last round is short where the whole is.",
        ),
        not_tested=("Rounds with a whole training each (`schedule=\"lottery\"` does it).", "Channels in several levels: see the case study and the curve."),
        shortened=f"{len(densities)} densities, {len(setting.seeds)} seeds, {lengths[0]} epochs, which is short for schedules with rounds; the full book has up to 18." if setting.quick else "",
    )  # fmt: skip


def _row(setting: Setting, epochs: int, density: float) -> tuple[Cell, ...]:
    found = {s: [_one(setting, s, density, epochs, seed) for seed in setting.seeds] for s in SCHEDULES}
    gains = [over_seeds(list(np.subtract(found[s], found["one-shot"]))) for s in SCHEDULES[1:]]
    return (f"{100 * (1 - density):g} %", epochs, *(over_seeds(found[s]) for s in SCHEDULES), *gains)


def _one(setting: Setting, schedule: str, density: float, epochs: int, seed: int) -> float:
    sparse = pare.sparsify(
        nets.program(setting, seed), digits.train_batches, step=digits.step, density=density, schedule=schedule,
        epochs=epochs, lr=0.03, teacher=nets.dense(setting, seed), seed=seed,
        checkpoint=setting.folder / f"{schedule}-{density}-{epochs}-{seed}.safetensors",
    )  # fmt: skip
    return nets.accuracy(sparse)


def _finding(name: str, row: tuple[Cell, ...], column: int) -> str:
    """What the highest sparsity at the longest training says, with its interval."""
    gain = row[column]
    if gain.low is None:
        return f"{name} pruning at {row[0]} removed: {gain.value:+.2f} points over one-shot, with one seed and so no interval."
    sure = gain.low > 0 or gain.high < 0
    word = "holds" if gain.low > 0 else "does not hold" if sure else "is not shown beyond the interval"
    return f"{name} pruning at {row[0]} removed, {row[1]} epochs: {gain.value:+.2f} points over one-shot ({gain.low:+.2f} to {gain.high:+.2f}). That it helps at high sparsity {word} here."
