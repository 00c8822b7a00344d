"""Low-rank factorization: layers as chains of smaller ones, beside channels at the same cost."""

from __future__ import annotations

import torch

import paredown as pare
from paredown.recipes import digits
from talk import draw, nets
from talk.page import Cell, Column, Formula, Page, Setting, Table, over_seeds

METHODS = {
    "svd": "singular values of the weight",
    "svd_llm": "singular values of what the layer gives on data",
    "spatial_svd": "k×1 and 1×k convolutions",
    "tucker2": "1×1, k×k and 1×1 convolutions",
}


def build(setting: Setting) -> Page:
    """Four methods and channel pruning at the same MACs, before and after recovery."""
    rows: list[tuple[Cell, ...]] = []
    shares = setting.pick((0.4,), (0.6, 0.4))
    for share in shares:
        ways = {**{m: f"{m}: {told}" for m, told in METHODS.items()}, "channels": "channels by L1 norm, removed"}
        for way, told in ways.items():
            found = [_one(setting, way, share, seed) for seed in setting.seeds]
            parameters, macs = found[0][2:]
            rows.append(
                (
                    f"{100 * share:g} % of the MACs",
                    told,
                    parameters,
                    macs,
                    over_seeds([f[0] for f in found]),
                    over_seeds([f[1] for f in found]),
                )
            )
    return Page(
        title="Low rank",
        told=("Low-rank factorization is named among the other methods.",),
        parts=(
            Formula(text="W [out, in] ≈ A [out, r] · B [r, in], which costs r · (out + in) instead of out · in"),
            _spectrum(setting),
            Table(
                caption=f"Accuracy in % on 540 test images, in PyTorch, means over {len(setting.seeds)} seeds; recovery of {nets.recovery_epochs(setting)} epochs with the dense network as teacher",
                columns=(
                    Column(title="Asked"), Column(title="Way"), Column(title="Parameters", mark="counted"), Column(title="MACs", mark="counted"),
                    Column(title="Before recovery, %", mark="measured", form=".1f"), Column(title="After, %", mark="measured", form=".2f"),
                ),
                rows=rows,
            ),
        ),
        differ=(
            *(_finding(rows, share) for share in shares),
            "A factorized layer is two layers: MACs fall, but twice as many tensors are written and read. What that costs in time is not on this page.",
        ),
        not_tested=("Latency of the chains.", "Ranks by measured loss (`choice=\"measured\"`)."),
        shortened=f"one amount, {len(setting.seeds)} seeds, {nets.recovery_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _finding(rows: list[tuple[Cell, ...]], share: float) -> str:
    """The best way by its mean, and whether its interval leaves that of channels."""
    some = [row for row in rows if row[0] == f"{100 * share:g} % of the MACs"]
    best, channels = max(some, key=lambda row: row[-1].value), some[-1]
    clear = best[-1].low is not None and best[-1].low > channels[-1].high
    told = "its interval lies above that of channels" if clear else "which the intervals do not tell from channels"
    return f"At {100 * share:g} % of the MACs the best mean after recovery is that of {best[1].partition(':')[0]}, {best[-1].value:.2f} %, {told if best is not channels else 'so low rank gained nothing here'}."


def _one(setting: Setting, way: str, share: float, seed: int) -> tuple[float, float, int, int]:
    """Accuracy before and after recovery, parameters, MACs."""
    program = nets.program(setting, seed)
    if way == "channels":
        coupling = pare.couple(program)
        small = pare.prune(
            program,
            pare.allocate(
                coupling, pare.score(program, coupling, "l1"), pare.examine(program), pare.Budget(macs=share)
            ),
        )
    else:
        data = digits.calibration_batches() if way == "svd_llm" else None
        plan = pare.choose_ranks(program, pare.Budget(macs=share), method=way, align=1, batches=data)
        small = pare.factorize(program, plan, batches=data)
    tuned = pare.recover(
        small, digits.train_batches, step=digits.step, teacher=nets.dense(setting, seed), lr=0.03, seed=seed, epochs=nets.recovery_epochs(setting),
        checkpoint=setting.folder / f"rank-{way}-{share}-{seed}.safetensors",
    )  # fmt: skip
    cost = pare.examine(pare.capture(tuned.module, digits.inputs(), train=False))
    return nets.accuracy(small), nets.accuracy(tuned), cost.parameters, cost.macs


def _spectrum(setting: Setting) -> draw.Figure:
    """Share of Σσ² that the first r singular values hold, trained and random."""
    trained, fresh = nets.dense(setting), pare.fresh(digits.model(), seed=100)
    points = {}
    for name in ("stage1.conv2.weight", "stage2.conv1.weight", "stage2.conv2.weight"):
        for which, net in (("trained", trained), ("random", fresh)):
            energy = torch.linalg.svdvals(net.get_parameter(name).detach().double().flatten(1)).square().cumsum(0)
            ranks = torch.linspace(1, len(energy), 17).round().int().tolist()
            points[f"{name.removesuffix('.weight')}, {which}"] = [
                (100 * r / len(energy), float(100 * energy[r - 1] / energy[-1])) for r in ranks
            ]
    return draw.lines(
        points,
        x="rank, % of full",
        y="Σσ² kept, %",
        caption="What the first singular values hold. A line far above the diagonal can be cut early",
        mark="counted",
        controls=[n for n in points if "random" in n],
    )
