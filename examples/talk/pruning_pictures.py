"""The three pictures of pruning: which cells of a matrix stay when elements, rows, columns or blocks leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import paredown as pare
from talk import draw, nets
from talk.page import Column, Page, Setting, Table, Text

WEIGHT = "stage2.shortcut.0.weight"
WAYS = {"element": "unstructured: the smallest weights", "row": "structured: the rows (filters) of least L1 norm", "column": "structured: the columns of least L1 norm", "4x4": "blocks of 4×4 of least L1 norm"}  # fmt: skip
OWN = "a mask of one’s own: a chessboard"


def build(setting: Setting) -> Page:
    """One trained weight matrix, half of it pruned in four ways."""
    net = nets.dense(setting)
    program = nets.program(setting)
    coupling, cost = pare.couple(program), pare.examine(program)
    dense_norm = float(program.state[WEIGHT].detach().abs().sum())
    figures, rows = [], [("nothing pruned", 100.0, 100.0, cost.macs, cost.macs, nets.accuracy(net))]
    plans = {way: (what, _half(program, coupling, cost, way)) for way, what in WAYS.items()}
    by_l2 = _half(program, coupling, cost, "row", "l2")
    plans |= {
        "row by L2": ("structured: the rows of least L2 norm", by_l2),
        "own": (OWN, pare.masks_of(program, _chessboard)),
    }
    for way, (what, plan) in plans.items():
        pruned = pare.prune(program, plan, condense=False)  # zeros, so that the pictures can be compared
        if way in WAYS or way == "own":
            figures.append(_picture(way, what, plan))
        norm = float(pruned.module.get_parameter(WEIGHT).detach().abs().sum())
        then = pare.foresee(coupling, cost, plan)
        rows.append(
            (
                what,
                100 * plan.masks[WEIGHT].density,
                100 * norm / dense_norm,
                then.macs,
                then.effective_macs,
                nets.accuracy(pruned),
            )
        )
    return Page(
        title="Three ways to prune a matrix",
        told=(
            "**Unstructured**: the lowest x % of weights by magnitude. **Structured**: the lowest x % of rows or columns (filters) by L1 norm. "
            "**Block**: the lowest x % of two-dimensional blocks by L1 norm; whole blocks are gone. Each with a picture of the matrix. Elsewhere it names L2 norms and masks of one’s own.",
        ),
        parts=(*figures, _table(rows), Text(text=_by_l2(plans["row"][1], by_l2)), _sizes(program, coupling, cost)),
        differ=(
            "The pictures are those of the talk, drawn from a trained layer (a 1×1 convolution from 32 to 64 channels) instead of a sketch.",
            "The freer the choice, the more of the norm stays at the same number of zeros: elements keep most, rows and columns least.",
            "A mask alone removes no multiplication: a dense runtime executes as many as before. Only what leaves physically makes the network smaller, see the second table and the page on which zeros speed up what.",
        ),
        shortened=f"the network was trained for {nets.base_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _half(
    program: pare.Program, coupling: pare.Coupling, cost: pare.Cost, way: str, criterion: str = "l1"
) -> pare.Plan:
    """The plan that masks half of the one layer."""
    scores = pare.score(program, coupling, criterion, granularity=way, include=[WEIGHT])
    return pare.allocate(coupling, scores, cost, pare.Budget(density=0.5), include=[WEIGHT])


def _chessboard(name: str, weight: torch.Tensor) -> torch.Tensor | None:
    """Every second weight, whatever it is."""
    if name != WEIGHT:
        return None
    row, column = torch.meshgrid(*(torch.arange(n) for n in weight.shape[:2]), indexing="ij")
    return ((row + column) % 2 == 0).reshape(weight.shape)


def _by_l2(first: pare.Plan, second: pare.Plan) -> str:
    """How far the two norms agree on what leaves."""
    gone = [_rows_gone(plan) for plan in (first, second)]
    return f"The talk names L2 norms too. Here {len(gone[0] & gone[1])} of the {len(gone[0])} rows that leave by L1 norm leave by L2 norm as well."


def _rows_gone(plan: pare.Plan) -> set[int]:
    kept: Sequence[bool] = plan.masks[WEIGHT].kept.reshape(plan.masks[WEIGHT].shape[0], -1).any(1)
    return {row for row, stays in enumerate(kept) if not stays}


def _picture(way: str, what: str, plan: pare.Plan) -> draw.Figure:
    drawn = pare.mask_picture(plan.masks[WEIGHT], inches=3.6)
    alt = f"The matrix of {WEIGHT}, 64 rows by 32 columns; dark cells stay, light ones are pruned, by {way}."
    return draw.picture(drawn, alt=alt, caption=f"**{way}**, {what}. Dark stays, light is pruned.")


def _table(rows: list[tuple[str, float, float, int, int, float]]) -> Table:
    return Table(
        caption="Half of this one layer pruned, nothing trained afterwards. Accuracy on 540 test images, in PyTorch",
        columns=(
            Column(title="Pruned"), Column(title="Weights that stay, %", mark="counted", form=".1f"),
            Column(title="Σ|w| that stays, %", mark="counted", form=".1f"), Column(title="MACs executed", mark="counted"),
            Column(title="Effective MACs", mark="estimated"), Column(title="Accuracy, %", mark="measured", form=".2f"),
        ),
        rows=rows,
    )  # fmt: skip


def _sizes(program: pare.Program, coupling: pare.Coupling, cost: pare.Cost) -> Table:
    """The whole network at half of its weights as a mask, and at half of its channels, gone."""
    masked = pare.prune(
        program,
        pare.allocate(
            coupling, pare.score(program, coupling, "l1", granularity="element"), cost, pare.Budget(density=0.5)
        ),
    )
    gone = pare.prune(
        program, pare.allocate(coupling, pare.score(program, coupling, "l1"), cost, pare.Budget(channels=0.5))
    )
    rows = []
    for name, net in (
        ("dense", program.module),
        ("half of all weights masked", masked.module),
        ("half of all channels removed", gone.module),
    ):
        found = pare.examine(pare.capture(net, torch.zeros(2, 1, 8, 8), train=False))
        rows.append(
            (
                name,
                found.parameters,
                sum(int((p != 0).sum()) for p in net.parameters()),
                found.parameter_bytes,
                found.macs,
            )
        )
    return Table(
        caption="The whole network: a mask leaves parameters, bytes and MACs as they were. Half of the channels are a quarter of most layers, which lose inputs as well as outputs",
        columns=(
            Column(title="Network"), Column(title="Parameters", mark="counted"), Column(title="Not zero", mark="counted"),
            Column(title="Bytes of parameters", mark="counted"), Column(title="MACs executed", mark="counted"),
        ),
        rows=rows,
    )  # fmt: skip
