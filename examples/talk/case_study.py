"""The case study: multi-level filter pruning of a regressor of a newborn's weight."""

from __future__ import annotations

import math

import torch
from newborn import longer
from newborn import rows as newborn
from torch import nn

import paredown as pare
from paredown.models import load_model
from paredown.pipeline.curves import curve
from talk.page import Cell, Column, Heading, Page, Setting, Table, Text

TOLD = (
    # filters pruned, MB, "GFLOPs" (multiply-adds), MAE in g
    ("none", 105.74, 5.37, 134.2),
    ("25 %", 54.51, 3.02, 129.4),
    ("25 %, then 33 %: 50 % in all", 26.48, 1.34, 134.4),
    ("50 % at once", 26.48, 1.34, 143.9),
)
KEPT = ((), (0.75,), (0.75, 2 / 3), (0.5,))
QUICK = ("base.epochs=2", "recover.epochs=2", "curve.seeds=[0, 1]", "curve.controls.kinds=[scratch]")
"""What of the twin's sweep a quick book leaves."""


def build(setting: Setting) -> Page:
    """A ResNet-50 at 256×256 counted beside the talk, and the errors of the synthetic twin."""
    given = newborn.read_sweep(setting.newborn)
    sweep = _swept(setting) if given is None else given
    costs, counted = _resnet50()
    left = [cost.macs / costs[0].macs for cost in costs]
    return Page(
        title="Case study: the weight of a newborn",
        told=(
            "An image and video regressor (grams) for phones. Multi-level filter pruning: 25 % of the filters, then 33 % of the rest, against 50 % at once.",
            "Why is the size half when 25 % of the filters go? And why did the error improve?",
        ),
        parts=(
            Table(
                caption="The talk’s four rows",
                columns=(Column(title="Filters pruned"), *(Column(title=t, mark="talk", form="g") for t in ("“MB”", "“GFLOPs”", "MAE, g")), Column(title="MACs remain", mark="talk", form=".3f"), Column(title="(1 − p)²", mark="counted", form=".4f")),
                rows=[(*row, row[2] / TOLD[0][2], _remains(k) ** 2) for row, k in zip(TOLD, KEPT, strict=True)],
            ),
            Heading(text="Size and multiply-adds, counted"),
            Table(
                caption="A ResNet-50 backbone with one output at 3×256×256, the same share of filters out of every space of channels, by paredown",
                columns=(
                    Column(title="Filters pruned"), Column(title="Parameters", mark="counted"), Column(title="MB", mark="counted", form=".2f"), Column(title="MiB", mark="counted", form=".2f"),
                    Column(title="GMACs", mark="counted", form=".3f"), Column(title="“GFLOPs”", mark="talk", form="g"),
                    Column(title="GMACs, and 2 for each value of a batch norm", mark="counted", form=".3f"),
                    Column(title="MACs remain", mark="counted", form=".3f"), Column(title="Proof: largest error / scale", mark="measured"),
                ),
                rows=counted,
            ),
            Text(text=_multiply_adds([cost.macs / 1e9 for cost in costs], [_with_norms(cost) / 1e9 for cost in costs])),
            _head(counted),
            Heading(text="The error, on a synthetic twin"),
            *newborn.twin_parts(sweep, TOLD, costs),
        ),
        differ=(
            "Half the size at 25 % of the filters: a layer loses inputs as well as outputs, so what remains is (1 − p)² = 0.5625, and 0.25 at 50 %. The printed MACs follow it to the third digit.",
            f"A real ResNet-50 does not quite: its first layer keeps the 3 inputs. Counted, {left[1]:.3f} and {left[3]:.3f} of the MACs remain.",
            "The printed size is 0.516 after the first step, not 0.5625. In MiB a backbone of ResNet-50 and a large head that shrinks faster explain it (table above). That is an inference: the network is not public.",
            "The data are private. `examples/newborn` makes a synthetic twin: pictures whose weight depends on body dimensions, with a known irreducible error. Its grams are its own and are not to be compared with the talk’s, only the order of the four rows is.",
            "The nearest work that is published is NurtureNet (arXiv 2405.05530), with 114.3 g on its own data and 15 MB for phones without a network. It cannot be compared with the twin either.",
        ),
        not_tested=("The talk’s own data and network.", "INT8 and the bundle for a phone are not on this page: `paredown compress examples/newborn/newborn.yaml` and `paredown bundle` make them. No phone ran them."),
        shortened="the twin’s sweep was made for this page with two seeds instead of five, 2 + 2 epochs instead of 24 + 16, and one control: it shows that all of it works, and its grams mean little." if setting.quick and given is None else "",
    )  # fmt: skip


def _swept(setting: Setting) -> newborn.Sweep:
    """The twin's sweep and the control beside it, run here; what was killed goes on, as the folder stays until the page is done."""
    folder = setting.folder / "newborn-curve"
    curve(newborn.RECIPE, out=folder, overrides=QUICK if setting.quick else (), quiet=True)
    longer.train_missing(folder)
    found = newborn.read_sweep(folder)
    assert found is not None  # or curve would have raised
    return found


def _remains(levels: tuple[float, ...]) -> float:
    left = 1.0
    for level in levels:
        left *= level
    return left


def _resnet50() -> tuple[list[pare.Cost], list[tuple[Cell, ...]]]:
    """The four rows, each pruned physically and proven."""
    net, _ = load_model("torchvision:resnet50")
    net.fc = nn.Linear(2048, 1)
    program = pare.capture(net, torch.zeros(2, 3, 256, 256))
    coupling, cost = pare.couple(program), pare.examine(program)
    scores = pare.score(program, coupling, "l1")
    costs, rows = [cost], list[tuple[Cell, ...]]()
    for (name, _, told, _), levels in zip(TOLD, KEPT, strict=True):
        if not levels:
            rows.append((name, *_sizes(cost, cost, told), "–"))
            continue
        # Two levels without a training between them remove what one would: the order of the filters does not change.
        plan = pare.allocate(coupling, scores, cost, pare.Budget(channels=_remains(levels)), align=1)
        small = pare.prune(program, plan)
        after = pare.examine(pare.capture(small.module, torch.zeros(2, 3, 256, 256), train=False))
        costs.append(after)
        rows.append((name, *_sizes(after, cost, told), f"{small.proof.max_error / small.proof.scale:.1e}"))
    return costs, rows


def _sizes(cost: pare.Cost, dense: pare.Cost, told: float) -> tuple[int, float, float, float, float, float, float]:
    return (
        cost.parameters,
        cost.state_dict_bytes / 1e6,
        cost.state_dict_bytes / 2**20,
        cost.macs / 1e9,
        told,
        _with_norms(cost) / 1e9,
        cost.macs / dense.macs,
    )


def _with_norms(cost: pare.Cost) -> int:
    """Multiply-adds, and two operations more for every value that a batch norm gives, as some counters have it."""
    return cost.macs + 2 * sum(math.prod(n.output_shape) for n in cost.by_node if n.kind == "batch_norm")


def _multiply_adds(macs: list[float], with_norms: list[float]) -> str:
    """What the talk's "GFLOPs" are, and how far counting comes to them."""
    told = [row[2] for row in TOLD]
    fits = [abs(a - b) <= 0.005 for a, b in zip(told, with_norms, strict=True)]
    pruned = ", ".join(f"{told[i]:g} against {with_norms[i]:.2f}" for i in (1, 3))
    return (
        f"The talk’s “GFLOPs” are multiply-adds, so {told[0]:g} stands beside {macs[0]:.2f} GMACs; elsewhere in this book FLOPs = 2 × MACs, which would be {2 * macs[0]:.2f}. "
        f"Two operations more for every value that a batch norm gives, as some counters add them, make it {with_norms[0]:.3f}, which "
        f"{'explains the difference' if fits[0] else 'does not explain the difference'} of the dense network. "
        f"{'They explain the pruned rows too' if fits[1] and fits[3] else 'They do not explain the pruned rows'}: {pruned}; {told[0]:g} × (1 − p)² is {told[0] * 0.5625:.2f} and {told[0] * 0.25:.2f}."
    )


def _head(counted: list[tuple[Cell, ...]]) -> Table:
    """If the printed MB are MiB of float32, what the backbone does not explain is a head."""
    rows = []
    for told, row in zip(TOLD, counted, strict=True):
        whole = told[1] * 2**20 / 4 / 1e6
        rows.append((told[0], told[1], whole, row[1] / 1e6, whole - row[1] / 1e6))
    return Table(
        caption="An inference: the printed MB read as MiB of float32, and what is left for a head beside the backbone, in millions of parameters",
        columns=(
            Column(title="Filters pruned"), Column(title="“MB”", mark="talk", form="g"), Column(title="Parameters, M, if MiB", mark="estimated", form=".2f"),
            Column(title="Backbone, M", mark="counted", form=".2f"), Column(title="Left for a head, M", mark="estimated", form=".2f"),
        ),
        rows=rows,
    )  # fmt: skip
