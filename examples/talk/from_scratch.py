"""Pruning from scratch: which mask to start from, and the same mask on random, rewound and trained weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import paredown as pare
from paredown.prune.schedule import OneShot
from paredown.recipes import digits
from talk import draw, nets
from talk.page import Column, Heading, Page, Setting, Spread, Table, over_seeds

DENSITY = 0.05
STARTS = {"snip": OneShot(), "grasp": OneShot(), "synflow": OneShot(rounds=100), "l1": OneShot(), "random": OneShot()}
WEIGHTS = ("random", "rewound", "trained")


def build(setting: Setting) -> Page:
    """Both experiments at 5 % of the weights."""
    epochs = nets.base_epochs(setting) + nets.recovery_epochs(setting)
    starts = [
        (f"`{c}` on fresh weights", over_seeds([_from_scratch(setting, c, seed) for seed in setting.seeds]))
        for c in STARTS
    ]
    starts.append(
        ("`l1` on trained weights, then recovery", over_seeds([_afterwards(setting, seed) for seed in setting.seeds]))
    )
    starts.append(("nothing pruned", over_seeds([nets.accuracy(nets.dense(setting, seed)) for seed in setting.seeds])))
    rates = setting.pick((0.003, 0.03, 0.3), (0.003, 0.01, 0.03, 0.1, 0.3))
    runs = {w: [_imposed(setting, w, rates, seed) for seed in setting.seeds] for w in WEIGHTS}
    imposed = {(w, lr): over_seeds([run[lr] for run in runs[w]]) for w, lr in itertools.product(WEIGHTS, rates)}
    best = {w: max(rates, key=lambda lr: imposed[w, lr].value) for w in WEIGHTS}
    return Page(
        title="Pruning from scratch",
        told=(
            "An open problem: which mask to start from? The talk says that a mask **imposed on a pretrained model does worse**, because of its minimum and its optimizer settings.",
        ),
        parts=(
            Heading(text="Which mask to start from"),
            Table(
                caption=f"{100 * DENSITY:g} % of the weights stay; {epochs} epochs in all each. Accuracy in % on 540 test images, in PyTorch, means over {len(setting.seeds)} seeds",
                columns=(Column(title="Mask"), Column(title="Accuracy, %", mark="measured", form=".2f", bar=True)),
                rows=starts,
            ),
            Heading(text="One mask on three sets of weights"),
            Table(
                caption=f"The mask: magnitudes of the trained network, {100 * DENSITY:g} % stay. Laid on fresh random weights, on the weights before training (rewound), and on the trained ones; then {_epochs(setting)} epochs of SGD at each learning rate",
                columns=(Column(title="Weights under the mask"), *(Column(title=f"lr {lr:g}", mark="measured", form=".1f") for lr in rates)),
                rows=[(w, *(imposed[w, lr] for lr in rates)) for w in WEIGHTS],
            ),
            draw.lines({w: [(math.log10(lr), imposed[w, lr]) for lr in rates] for w in WEIGHTS}, x="log₁₀ of the learning rate", y="accuracy, %", caption="The same as lines. Bars: 95 % intervals over seeds"),
        ),
        differ=(_verdict(runs, best), *(f"{w.capitalize()} weights do best at lr {best[w]:g}: {imposed[w, best[w]].value:.1f} %." for w in WEIGHTS), _spread_over_rates(imposed, rates)),
        not_tested=("Masks that move (`schedule=\"rigl\"`).", "A network whose task is hard enough that all of this matters more."),
        shortened=f"{len(setting.seeds)} seeds, {len(rates)} learning rates, {_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _epochs(setting: Setting) -> int:
    return setting.pick(3, 10)


def _from_scratch(setting: Setting, criterion: str, seed: int) -> float:
    """A mask chosen on fresh weights, then one training as long as base and recovery."""
    sparse = pare.sparsify(
        pare.capture(digits.model(seed=seed), digits.inputs()), digits.train_batches, step=digits.step, density=DENSITY,
        criterion=criterion, schedule=STARTS[criterion], optimizer="adamw", lr=digits.LR, weight_decay=digits.WEIGHT_DECAY,
        epochs=nets.base_epochs(setting) + nets.recovery_epochs(setting), seed=seed,
        checkpoint=setting.folder / f"scratch-{criterion}-{seed}.safetensors",
    )  # fmt: skip
    return nets.accuracy(sparse)


def _mask(setting: Setting, seed: int) -> pare.Plan:
    """The largest weights of the trained network, across layers."""
    program = nets.program(setting, seed)
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, "l1", granularity="element")
    return pare.allocate(coupling, scores, pare.examine(program), pare.Budget(density=DENSITY), allocation="global")


def _afterwards(setting: Setting, seed: int) -> float:
    pruned = pare.prune(nets.program(setting, seed), _mask(setting, seed))
    tuned = pare.recover(
        pruned, digits.train_batches, step=digits.step, optimizer="adamw", lr=digits.LR, weight_decay=digits.WEIGHT_DECAY,
        epochs=nets.recovery_epochs(setting), seed=seed, checkpoint=setting.folder / f"scratch-afterwards-{seed}.safetensors",
    )  # fmt: skip
    return nets.accuracy(tuned)


def _imposed(setting: Setting, weights: str, rates: Sequence[float], seed: int) -> dict[float, float]:
    """The same mask on other weights, trained at each rate; `rewound` are those that the trained network began with."""
    start = digits.model(seed=seed)
    net = {"random": pare.fresh(start, seed=1000 + seed), "rewound": start, "trained": nets.dense(setting, seed)}[
        weights
    ]
    sparse = pare.prune(pare.capture(net, digits.inputs()), _mask(setting, seed))
    found = {}
    for lr in rates:
        tuned = pare.recover(
            sparse, digits.train_batches, step=digits.step, lr=lr, epochs=_epochs(setting), seed=seed,
            checkpoint=setting.folder / f"imposed-{weights}-{lr}-{seed}.safetensors",
        )  # fmt: skip
        found[lr] = nets.accuracy(tuned)
    return found


def _verdict(runs: dict[str, list[dict[float, float]]], best: dict[str, float]) -> str:
    """Trained weights against the others, seed by seed, each at its best rate: an interval that leaves out 0 counts."""
    tops = {w: [run[best[w]] for run in runs[w]] for w in WEIGHTS}
    gaps = {w: over_seeds([a - b for a, b in zip(tops["trained"], tops[w], strict=True)]) for w in WEIGHTS[:2]}
    if any(gap.low is None for gap in gaps.values()):
        word = "cannot be said from one seed"
    elif all(gap.high < 0 for gap in gaps.values()):
        word = "holds here"
    elif all(gap.low > 0 for gap in gaps.values()):
        word = "does not hold here: they do better"
    else:
        word = "is not shown beyond the intervals here"
    told = "; ".join(
        f"{gap.value:+.1f} points against {w} ones"
        + ("" if gap.low is None else f" ({gap.low:+.1f} to {gap.high:+.1f})")
        for w, gap in gaps.items()
    )
    return f"That trained weights do worse under an imposed mask {word}: each at the learning rate that is best for it on these test images, trained weights have {told}."


def _spread_over_rates(imposed: dict[tuple[str, float], Spread], rates: tuple[float, ...]) -> str:
    widths = {w: max(imposed[w, lr].value for lr in rates) - min(imposed[w, lr].value for lr in rates) for w in WEIGHTS}
    return (
        "The optimizer’s settings matter: between the worst and the best learning rate lie "
        + ", ".join(f"{v:.1f} points ({w})" for w, v in widths.items())
        + ". A comparison at one learning rate could be made to say anything."
    )
