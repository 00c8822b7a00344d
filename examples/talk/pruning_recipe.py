"""The talk's recipe of pruning as one command: the curve, its sweet spot, and an equal dense network."""

from __future__ import annotations

from typing import Any

from paredown.curve import CONTROLS
from paredown.pipeline.curves import curve
from paredown.report.curve_figures import Mark
from talk import draw, nets
from talk.page import Column, Page, Setting, Spread, Table, Text


def build(setting: Setting) -> Page:
    """`paredown curve digits`, read back from its document."""
    amounts, seeds = setting.pick([0.75, 0.5, 0.25], [0.85, 0.7, 0.55, 0.4, 0.25]), [*setting.seeds]
    found = curve(
        "digits",
        out=setting.folder / "curve",
        overrides=[
            f"curve.amounts={amounts}", f"curve.seeds={seeds}", "curve.limit=1.0", f"curve.controls.amounts={setting.pick(amounts[1:2], [amounts[1], amounts[-1]])}",
            f"base.epochs={nets.base_epochs(setting)}", f"recover.epochs={nets.recovery_epochs(setting)}",
            f"curve.schedules={setting.pick('[one-shot]', '[one-shot, multi-level]')}",
        ],
        quiet=True,
    ).document  # fmt: skip
    spot = found["sweet_spot"]
    return Page(
        title="The pruning recipe: curve and sweet spot",
        told=(
            "Load the pretrained model; choose parameters and method; prune to a percentage; fine-tune; plot **sparsity against accuracy** and find "
            "the sweet spot; ask whether an equivalent smaller dense model performs the same.",
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
        ),
        differ=(
            "The talk shows the recipe without numbers; there is nothing to differ from. Its question about a smaller dense model is answered above, for this task.",
            "The sweet spot is chosen on held-out images and told on test images: a point chosen on test data would flatter itself. Amounts are of channels; what is drawn is weights, so half of the channels removed is three quarters of the weights.",
        ),
        not_tested=("Other tasks than the digits in this book: `paredown curve` takes any.",),
        shortened=f"{len(amounts)} amounts, {len(seeds)} seeds, {nets.base_epochs(setting)} + {nets.recovery_epochs(setting)} epochs; one-shot only, controls at one amount; with two seeds an interval is little more than the two values." if setting.quick else "",
    )  # fmt: skip


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
