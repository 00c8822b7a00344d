"""The case study: multi-level filter pruning of a regressor of a newborn's weight."""

from __future__ import annotations

import torch
from newborn import rows as newborn
from torch import nn

import paredown as pare
from paredown.models import load_model
from talk.page import Cell, Column, Heading, Page, Setting, Table

TOLD = (
    # filters pruned, MB, GFLOPs, MAE in g
    ("none", 105.74, 5.37, 134.2),
    ("25 %", 54.51, 3.02, 129.4),
    ("25 %, then 33 %: 50 % in all", 26.48, 1.34, 134.4),
    ("50 % at once", 26.48, 1.34, 143.9),
)
KEPT = ((), (0.75,), (0.75, 2 / 3), (0.5,))


def build(setting: Setting) -> Page:
    """A ResNet-50 at 256×256 counted beside the talk, and the errors of the synthetic twin where they were measured."""
    sweep = newborn.read_sweep(setting.newborn)
    costs, counted = _resnet50()
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
                    Column(title="GMACs", mark="counted", form=".3f"), Column(title="MACs remain", mark="counted", form=".3f"), Column(title="Proof: largest error / scale", mark="measured"),
                ),
                rows=counted,
            ),
            _head(counted),
            Heading(text="The error, on a synthetic twin"),
            *newborn.twin_parts(sweep, TOLD, costs),
        ),
        differ=(
            "Half the size at 25 % of the filters: a layer loses inputs as well as outputs, so what remains is (1 − p)² = 0.5625, and 0.25 at 50 %. The printed MACs follow it to the third digit.",
            f"A real ResNet-50 does not quite: its first layer keeps the 3 inputs. Counted, {counted[1][5]:.3f} and {counted[3][5]:.3f} of the MACs remain.",
            "The printed size is 0.516 after the first step, not 0.5625. In MiB a backbone of ResNet-50 and a large head that shrinks faster explain it (table above). That is an inference: the network is not public.",
            "The data are private. `examples/newborn` makes a synthetic twin: pictures whose weight depends on body dimensions, with a known irreducible error. Its grams are its own and are not to be compared with the talk’s, only the order of the four rows is.",
        ),
        not_tested=("The talk’s own data and network; a phone.", *([] if sweep else [f"The twin’s errors: run `{newborn.COMMAND}`, then this page again."])),
    )  # fmt: skip


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
    for (name, *_), levels in zip(TOLD, KEPT, strict=True):
        if not levels:
            rows.append((name, *_sizes(cost, cost), "–"))
            continue
        # Two levels without a training between them remove what one would: the order of the filters does not change.
        plan = pare.allocate(coupling, scores, cost, pare.Budget(channels=_remains(levels)), align=1)
        small = pare.prune(program, plan)
        after = pare.examine(pare.capture(small.module, torch.zeros(2, 3, 256, 256), train=False))
        costs.append(after)
        rows.append((name, *_sizes(after, cost), f"{small.proof.max_error / small.proof.scale:.1e}"))
    return costs, rows


def _sizes(cost: pare.Cost, dense: pare.Cost) -> tuple[int, float, float, float, float]:
    return (
        cost.parameters,
        cost.state_dict_bytes / 1e6,
        cost.state_dict_bytes / 2**20,
        cost.macs / 1e9,
        cost.macs / dense.macs,
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
