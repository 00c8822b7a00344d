"""The talk's recipe of pruning as one command: the curve, its sweet spot, and an equal dense network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paredown as pare
from paredown.curve import CONTROLS
from paredown.pipeline.curves import curve
from paredown.recipes import digits
from paredown.report.curve_figures import Mark
from talk import draw, nets
from talk.page import Cell, Column, Page, Setting, Spread, Table, Text, over_seeds


def build(setting: Setting) -> Page:
    """`paredown curve digits`, read back from its document."""
    amounts, seeds = setting.pick([0.75, 0.5, 0.25], [0.85, 0.7, 0.55, 0.4, 0.25]), [*setting.seeds]
    found = curve(
        "digits",
        out=setting.folder / "curve",
        overrides=[
            f"curve.amounts={amounts}", f"curve.seeds={seeds}", "curve.limit=1.0", f"curve.controls.amounts=[sweet-spot, {setting.pick(amounts[1], amounts[-1])}]",
            f"base.epochs={nets.base_epochs(setting)}", f"recover.epochs={nets.recovery_epochs(setting)}",
            f"curve.schedules={setting.pick('[one-shot]', '[one-shot, multi-level]')}",
        ],
        quiet=True,
    ).document  # fmt: skip
    spot, recovered = found["sweet_spot"], _recovered(setting, [amounts[1], amounts[-1]])
    return Page(
        title="The pruning recipe: curve and sweet spot",
        told=(
            "Load the pretrained model; choose parameters and method; prune to a percentage; fine-tune; plot **sparsity against accuracy** and find "
            "the sweet spot; ask whether an equivalent smaller dense model performs the same.",
            "Removal regularises and can **improve** the metric; fine-tuning recovers what was lost.",
        ),
        parts=(
            draw.flow(
                [
                    ("Load", f"a network trained for {nets.base_epochs(setting)} epochs"), ("Choose", "channels, by L1 norm, uniformly"),
                    ("Prune", f"{', '.join(f'{100 * a:g} %' for a in amounts)} of the channels stay"),
                    ("Fine-tune", f"{nets.recovery_epochs(setting)} epochs, dense network as teacher"),
                    ("Plot", "weights removed against accuracy"), ("Compare", "with equal dense networks, trained as long"),
                ],
                caption="The recipe, as it was carried out",
            ),
            _chart(found),
            Text(text=f"**The sweet spot.** {spot['sentence']}"),
            Text(text=f"**The dense question.** {found['dense_verdict']}"),
            _points(found),
            *([_comparisons(found)] if found["comparisons"] else []),
            recovered,
        ),
        differ=(
            *(_finding(row) for row in recovered.rows),
            "The talk shows the recipe without numbers; there is nothing to differ from. Its question about a smaller dense model is answered above, for this task.",
            "The sweet spot is chosen on held-out images and told on test images: a point chosen on test data would flatter itself. Amounts are of channels; what is drawn is weights, so half of the channels removed is three quarters of the weights.",
        ),
        not_tested=("Other tasks than the digits in this book: `paredown curve` takes any.",),
        shortened=f"{len(amounts)} amounts, {len(seeds)} seeds, {nets.base_epochs(setting)} + {nets.recovery_epochs(setting)} epochs; one-shot only, controls at the sweet spot and at one amount; with two seeds an interval is little more than the two values." if setting.quick else "",
    )  # fmt: skip


def _recovered(setting: Setting, amounts: Sequence[float]) -> Table:
    """What pruning takes, and what fine-tuning gives back, on the networks that other pages share."""
    dense = [nets.accuracy(nets.dense(setting, seed)) for seed in setting.seeds]
    rows: list[tuple[Cell, ...]] = []
    for amount in amounts:
        before, after = zip(*(_one(setting, amount, seed) for seed in setting.seeds), strict=True)
        columns = [
            dense,
            before,
            after,
            *([a - b for a, b in zip(some, dense, strict=True)] for some in (before, after)),
        ]
        rows.append((f"{100 * amount:g} %", *(over_seeds(list(column)) for column in columns)))
    return Table(
        caption=f"Before and after fine-tuning: accuracy in % on 540 test images, networks in PyTorch, trained apart from those of the curve; differences in points, seed by seed. {nets.recovery_epochs(setting)} epochs",
        columns=(
            Column(title="Channels that stay"), Column(title="Dense", mark="measured", form=".2f"), Column(title="Pruned", mark="measured", form=".2f"),
            Column(title="Fine-tuned", mark="measured", form=".2f"), Column(title="Pruned − dense", mark="measured", form="+.2f"),
            Column(title="Fine-tuned − dense", mark="measured", form="+.2f"),
        ),
        rows=rows,
    )  # fmt: skip


def _one(setting: Setting, amount: float, seed: int) -> tuple[float, float]:
    """Accuracy of a pruned network before and after fine-tuning."""
    program = nets.program(setting, seed)
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, "l1")
    small = pare.prune(program, pare.allocate(coupling, scores, pare.examine(program), pare.Budget(channels=amount)))
    tuned = pare.recover(
        small, digits.train_batches, step=digits.step, teacher=nets.dense(setting, seed), lr=0.03, seed=seed,
        epochs=nets.recovery_epochs(setting), checkpoint=setting.folder / f"recovered-{amount}-{seed}.safetensors",
    )  # fmt: skip
    return nets.accuracy(small), nets.accuracy(tuned)


def _finding(row: Sequence[Any]) -> str:
    """What was lost, what came back, and whether the pruned network is better than the dense one."""
    lost, left = row[-2], row[-1]
    told = f"With {row[0]} of the channels pruning moves the accuracy by {lost.value:+.1f} points, and after fine-tuning {left.value:+.1f} remain"
    if left.low is None:
        return f"{told}, with one seed and so no interval."
    word = "it improves" if left.low > 0 else "it is worse" if left.high < 0 else "neither gain nor loss is shown"
    return f"{told} ({left.low:+.1f} to {left.high:+.1f}): against the dense network {word}."


def _lines(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Those with points of their own; a control that is the same network as another one (the verdict says so) is left out."""
    kept: list[dict[str, Any]] = []
    for line in found["lines"]:
        alike = any([p["test"] for p in line["points"]] == [p["test"] for p in other["points"]] for other in kept)
        if len(line["points"]) > 1 and not alike:
            kept.append(line)
    return kept


def _chart(found: dict[str, Any]) -> draw.Figure:
    points = {
        line["name"]: [(p["removed"]["sparsity"], _spread(p["test"])) for p in line["points"] if p["test"]]
        for line in _lines(found)
    }
    controls = [line["name"] for line in found["lines"] if line["kind"] in CONTROLS]
    return draw.lines(
        points, x="weights removed, %", y="accuracy on test images, %", controls=controls, spot=_spot(found),
        caption="Files of ONNX Runtime, 540 test images. Bars: 95 % intervals over seeds; dashed: controls, as long in training",
    )  # fmt: skip


def _spot(found: dict[str, Any]) -> Mark | None:
    spot = found["sweet_spot"]
    if spot["removed"] is None:
        return None
    line = next(line for line in found["lines"] if line["name"] == spot["line"])
    point = next(p for p in line["points"] if p["amount"] == spot["amount"])
    return Mark(x=spot["removed"], y=point["test"]["mean"], low=spot["low"], high=spot["high"])


def _spread(over_seeds: dict[str, Any]) -> Spread:
    return Spread(value=over_seeds["mean"], low=over_seeds["low"], high=over_seeds["high"])


def _points(found: dict[str, Any]) -> Table:
    """The dense network once, then every point of every line."""
    lines = _lines(found)
    points = [
        ("dense", lines[0]["points"][0]),
        *((line["name"], p) for line in lines for p in line["points"] if p["amount"]),
    ]
    rows = [
        (
            name, "all" if p["amount"] is None else f"{100 * p['amount']:g} %", p["removed"]["sparsity"],
            round(p["absolute"]["bytes"]), round(p["absolute"]["macs"]), _spread(p["held_out"]), _spread(p["test"]),
        )
        for name, p in points
    ]  # fmt: skip
    return Table(
        caption="Every point: means over seeds",
        columns=(
            Column(title="Line"), Column(title="Channels that stay"), Column(title="Weights removed, %", mark="counted", form=".1f"),
            Column(title="Bytes of the file", mark="measured"), Column(title="MACs", mark="counted"),
            Column(title="Accuracy, held out, %", mark="measured", form=".2f"), Column(title="Accuracy, test, %", mark="measured", form=".2f"),
        ),
        rows=rows,
    )  # fmt: skip


def _comparisons(found: dict[str, Any]) -> Table:
    rows = [
        (c["line"], f"{100 * c['amount']:g} %", CONTROLS[c["control"]], _spread(c["gain"]), c["sentence"])
        for c in found["comparisons"]
    ]
    return Table(
        caption="Pruned against its controls, seed by seed, on test images; positive: pruning is better",
        columns=(
            Column(title="Line"), Column(title="Channels that stay"), Column(title="Against"),
            Column(title="Gain, points", mark="measured", form="+.2f"), Column(title="In words"),
        ),
        rows=rows,
    )  # fmt: skip
