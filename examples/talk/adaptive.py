"""Adaptive pruning: "the weights corresponding to the gradients which move away more", in both readings."""

from __future__ import annotations

import itertools

import paredown as pare
from paredown.recipes import digits
from talk import draw, nets
from talk.page import Column, Formula, Page, Setting, Table, over_seeds

READINGS = {
    "accumulated_movement": "lowest Σ −g·w: weights that move towards zero",
    "gradient_drift": "largest |Σ g|: gradients that drift most, literally",
    "movement": "movement pruning, scores learnt in the training",
    "l1": "magnitude, which watches no gradient",
    "random": "chance",
}


def build(setting: Setting) -> Page:
    """Five criteria on the same gradual schedule."""
    densities = setting.pick((0.1, 0.03), (0.3, 0.2, 0.1, 0.05, 0.03))
    scored = {
        (c, d): over_seeds([_one(setting, c, d, seed) for seed in setting.seeds])
        for c, d in itertools.product(READINGS, densities)
    }
    rows = [(f"`{c}`", told, *(scored[c, d] for d in densities)) for c, told in READINGS.items()]
    best = {d: max(READINGS, key=lambda c: scored[c, d].value) for d in densities}
    two = {d: [scored[c, d].value for c in ("accumulated_movement", "gradient_drift", "random")] for d in densities}
    return Page(
        title="Adaptive pruning, in both readings",
        told=("Adaptive: “monitor gradients and prune the weights corresponding to the gradients which move away more”.",),
        parts=(
            Formula(text="Σ −gₜ · wₜ over the steps t: positive where training makes |w| grow. The lowest leave (as in movement pruning, Sanh et al. 2020)."),
            Formula(text="|Σ gₜ| over the steps t: how far the gradients carry the weight, wherever to. The largest leave (the talk’s words, taken literally)."),
            Table(
                caption=f"Accuracy in % on 540 test images, in PyTorch, means over {len(setting.seeds)} seeds; all on the gradual schedule, {_epochs(setting)} epochs; what a layer keeps goes by its shape, alike for all five",
                columns=(
                    Column(title="Criterion"), Column(title="What leaves"),
                    *(Column(title=f"{100 * (1 - d):g} % removed", mark="measured", form=".2f") for d in densities),
                ),
                rows=rows,
            ),
            draw.lines({c: [(100 * (1 - d), scored[c, d]) for d in densities] for c in READINGS}, x="weights removed, %", y="accuracy, %", caption="The same as lines. Bars: 95 % intervals over seeds", controls=["random"]),
        ),
        differ=(
            *(f"At {100 * (1 - d):g} % removed the best mean of the five is that of `{best[d]}`; movement accumulated {two[d][0]:.1f} %, drift {two[d][1]:.1f} %, chance {two[d][2]:.1f} %." for d in densities),
            "The sentence can be read in two ways, so both are offered. They are near opposites: a weight with a large drift away from zero is kept by the first and pruned by the second.",
            "Movement pruning was made for a network that learns a new task. Here the weights have converged on this one before anything is monitored.",
            "How much a layer keeps goes by its shape (`erk`), alike for all five, so that they differ in nothing but the choice within a layer. 10 % is chance among ten digits.",
        ),
        not_tested=("Fine-tuning on another task, for which movement pruning was made.",),
        shortened=f"{len(densities)} densities, {len(setting.seeds)} seeds, {_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _epochs(setting: Setting) -> int:
    return setting.pick(3, 8)


def _one(setting: Setting, criterion: str, density: float, seed: int) -> float:
    """Accuracy in %."""
    sparse = pare.sparsify(
        nets.program(setting, seed), digits.train_batches, step=digits.step, density=density, criterion=criterion,
        allocation="erk", schedule="gradual", epochs=_epochs(setting), lr=0.03, teacher=nets.dense(setting, seed), seed=seed,
        checkpoint=setting.folder / f"{criterion}-{density}-{seed}.safetensors",
    )  # fmt: skip
    return nets.accuracy(sparse)
