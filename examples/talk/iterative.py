"""Iterative pruning against one-shot, at the same length of training."""

from __future__ import annotations

import numpy as np

import paredown as pare
from paredown.recipes import digits
from talk import draw, nets
from talk.page import Column, Page, Setting, Table, over_seeds

SCHEDULES = ("one-shot", "iterative", "gradual")


def build(setting: Setting) -> Page:
    """Masks by magnitude across layers, at high sparsity, three schedules."""
    densities = setting.pick((0.08, 0.02), (0.2, 0.1, 0.05, 0.03, 0.02))
    found = {(s, d): [_one(setting, s, d, seed) for seed in setting.seeds] for s in SCHEDULES for d in densities}
    rows = [
        (
            f"{100 * (1 - d):g} %", *(over_seeds(found[s, d]) for s in SCHEDULES),
            *(over_seeds(list(np.subtract(found[s, d], found["one-shot", d]))) for s in SCHEDULES[1:]),
        )
        for d in densities
    ]  # fmt: skip
    dense = over_seeds([nets.accuracy(nets.dense(setting, seed)) for seed in setting.seeds])
    points = {s: [(100 * (1 - d), over_seeds(found[s, d])) for d in densities] for s in SCHEDULES}
    return Page(
        title="Iterative against one-shot",
        told=("Iterative pruning: prune, train, repeat. It helps at high sparsity.",),
        parts=(
            draw.lines(points, x="weights removed, %", y="accuracy, %", caption=f"Masks by magnitude across layers, {_epochs(setting)} epochs each. Dense: {dense.value:.1f} %. Bars: 95 % intervals over seeds"),
            Table(
                caption=f"Accuracy in % on 540 test images, in PyTorch, means over {len(setting.seeds)} seeds; every schedule trains for {_epochs(setting)} epochs in all",
                columns=(
                    Column(title="Removed"), *(Column(title=s, mark="measured", form=".2f") for s in SCHEDULES),
                    *(Column(title=f"{s} − one-shot, points", mark="measured", form="+.2f") for s in SCHEDULES[1:]),
                ),
                rows=rows,
            ),
        ),
        differ=(
            *_findings(rows),
            "The comparison is fair only where both train equally long: iterative pruning is often shown with many times the training of one-shot. Here the rounds share it.",
        ),
        not_tested=("Rounds with a whole training each (`schedule=\"lottery\"` does it).", "Channels in several levels: see the case study and the curve."),
        shortened=f"{len(densities)} densities, {len(setting.seeds)} seeds, {_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _epochs(setting: Setting) -> int:
    return setting.pick(5, 12)


def _one(setting: Setting, schedule: str, density: float, seed: int) -> float:
    net = nets.dense(setting, seed)
    sparse = pare.sparsify(
        pare.capture(net, digits.inputs()), digits.train_batches, step=digits.step, density=density, schedule=schedule,
        epochs=_epochs(setting), lr=0.03, teacher=net, seed=seed,
        checkpoint=setting.folder / f"{schedule}-{density}-{seed}.safetensors",
    )  # fmt: skip
    return nets.accuracy(sparse)


def _findings(rows: list[tuple]) -> list[str]:
    """What the last row, the highest sparsity, says of each schedule."""
    told = []
    for column, name in ((-2, "Iterative"), (-1, "Gradual")):
        gain = rows[-1][column]
        sure = gain.low is not None and (gain.low > 0 or gain.high < 0)
        word = "holds" if gain.value > 0 and sure else "does not hold" if sure else "is not shown beyond the interval"
        told.append(
            f"{name} pruning at {rows[-1][0]} removed: {gain.value:+.2f} points over one-shot ({gain.low:+.2f} to {gain.high:+.2f}); at {rows[0][0]}: {rows[0][column].value:+.2f}. That it helps at high sparsity {word} here."
        )
    return told
