"""Which zeros make a layer faster: equally many as elements, rows and blocks, in four ways to compute."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import nn

import paredown as pare
from talk import draw
from talk.page import Cell, Column, Page, Setting, Spread, Table, Text
from talk.timing import PROTOCOL, Call, Floats, in_turns, middle, opened

WIDTH, ROWS, BLOCK = 512, 32, "16x16"
WEIGHTS = ["0.weight", "2.weight"]
FILES = ("elements", "rows as zeros", f"blocks {BLOCK}", "rows removed")
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def build(setting: Setting) -> Page:
    """A pair of linear layers, 512 → 512 → 512, on 32 rows."""
    shares = setting.pick((0.5, 0.8, 0.95), SPARSITIES)
    torch.manual_seed(0)
    program = pare.capture(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)), torch.zeros(2, WIDTH)
    )
    files = runtimes(program, shares, setting)
    sparse = torch_formats(program, setting)
    ways = [(runtime, way) for runtime in ("ONNX Runtime", "OpenVINO") for way in FILES]
    rows = [
        (f"{runtime}: {way}", *(_gain(files, f"{runtime} dense", f"{runtime} {way} {s}") for s in shares))
        for runtime, way in ways
    ]
    rows += [
        (f"torch {way}", *(_gain(sparse, "torch dense", f"torch {way} {s}") for s in shares))
        for way in ("CSR, elements", f"BSR, blocks {BLOCK}")
    ]
    curves = {
        way: [(100 * s, _over(sparse, way, s)) for s in SPARSITIES] for way in ("CSR, elements", f"BSR, blocks {BLOCK}")
    }
    curves["dense"] = [(100 * s, 1.0) for s in (SPARSITIES[0], SPARSITIES[-1])]
    break_even = {way: crossing([(x, y) for x, y in points]) for way, points in curves.items() if way != "dense"}
    return Page(
        title="Which zeros speed up what",
        told=("Why structured: frameworks hardly run sparse matrices, so unstructured sparsity may **slow inference down**. Blocks suit units that multiply tiles.",),
        parts=(
            Table(
                caption=f"Times faster than the dense layers, by the share of zeros. {WIDTH} → {WIDTH} → {WIDTH} on {ROWS} rows, float32; {PROTOCOL}. Small print: quartiles of the factor, round by round",
                columns=(Column(title="Zeros as"), *(Column(title=f"{100 * s:g} % zeros", mark="measured", form=".2f") for s in shares)),
                rows=rows,
            ),
            draw.lines(curves, x="zeros, %", y="time, dense = 1", caption="Sparse formats of torch against torch’s dense product: below 1 they are faster", controls=["dense"]),
            Table(
                caption="Break-even: the share of zeros from which on the format is faster than dense, between the measured points by a straight line",
                columns=(Column(title="Format"), Column(title="Break-even, % zeros", mark="estimated", form=".0f")),
                rows=[(way, at if at is not None else f"not up to {100 * SPARSITIES[-1]:g} %") for way, at in break_even.items()],
            ),
            _estimated(program, shares[-1], files),
            Text(text="A row of a linear layer is what a filter is of a convolution. “Rows removed” are as many rows as the others have zeros, to a multiple of 8: paredown takes them out with the columns of the next layer that read them, so both products get smaller."),
        ),
        differ=tuple(_findings(rows, shares, break_even)),
        not_tested=("Block-sparse kernels made for these blocks, and sparse units of GPUs (2:4): a later round.", "OpenVINO’s own sparse decompression, which wants INT8 weights and a processor with AMX."),
        shortened="three shares of zeros for the runtimes instead of six." if setting.quick else "",
    )  # fmt: skip


def _estimated(program: pare.Program, share: float, files: Mapping[str, Floats]) -> Table:
    """What a mask could save, beside what is executed and what is gained."""
    coupling, cost = pare.couple(program), pare.examine(program)
    rows: list[tuple[Cell, ...]] = [("dense", cost.macs, cost.macs, 1.0)]
    for way in FILES:
        then = pare.foresee(coupling, cost, pruned(program, way, share).plan)
        gain = _gain(files, "ONNX Runtime dense", f"ONNX Runtime {way} {share}")
        rows.append((way, then.macs, then.effective_macs, gain))
    return Table(
        caption=f"Multiply-adds of one row of input at {100 * share:g} % zeros: what a dense runtime executes, what could be saved, and what ONNX Runtime gains",
        columns=(
            Column(title="Zeros as"), Column(title="MACs executed", mark="counted"), Column(title="Effective MACs", mark="estimated"),
            Column(title="Times faster", mark="measured", form=".2f"),
        ),
        rows=rows,
    )  # fmt: skip


def pruned(program: pare.Program, way: str, share: float) -> pare.Pruned:
    """The layers with a share of zeros, or of rows removed; by L1 norm."""
    coupling, cost = pare.couple(program), pare.examine(program)
    if way == "rows removed":
        scores, budget = pare.score(program, coupling, "l1"), pare.Budget(channels=1 - share)
        plan = pare.allocate(coupling, scores, cost, budget, floor=0.01)  # the default, 0.1, ends at 90 %
        return pare.prune(program, plan)
    granularity = {"elements": "element", "rows as zeros": "row"}.get(way, BLOCK)
    scores = pare.score(program, coupling, "l1", granularity=granularity, include=WEIGHTS)
    plan = pare.allocate(coupling, scores, cost, pare.Budget(density=1 - share), allocation="uniform", include=WEIGHTS)
    return pare.prune(program, plan, condense=False)


def runtimes(program: pare.Program, shares: tuple[float, ...], setting: Setting) -> dict[str, Floats]:
    """Milliseconds of exported files, all in turns."""
    files = {"dense": pare.export(program, setting.folder / "zeros-dense.onnx").path}
    for share in shares:
        for way in FILES:
            path = setting.folder / f"zeros-{way.replace(' ', '-')}-{share}.onnx"
            files[f"{way} {share}"] = pare.export(pruned(program, way, share), path).path
    sessions = {f"{r} {name}": opened(file, r) for name, file in files.items() for r in ("ONNX Runtime", "OpenVINO")}
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH), dtype=np.float32)
    return in_turns(
        sessions, {name: {s.get_inputs()[0].name: x} for name, s in sessions.items()}, runs=setting.pick(60, 200)
    )


def torch_formats(program: pare.Program, setting: Setting) -> dict[str, Floats]:
    """Milliseconds of the first layer’s product in torch: dense, CSR, BSR."""
    x = torch.randn(WIDTH, ROWS)
    weights = {"torch dense": program.state["0.weight"].detach()}
    for share in SPARSITIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that its CSR is in beta
            csr = pruned(program, "elements", share).module.get_parameter("0.weight").detach().to_sparse_csr()
            bsr = (
                pruned(program, f"blocks {BLOCK}", share)
                .module.get_parameter("0.weight")
                .detach()
                .to_sparse_bsr((16, 16))
            )
        weights |= {f"torch CSR, elements {share}": csr, f"torch BSR, blocks {BLOCK} {share}": bsr}
    sessions = {name: Call(lambda given, w=weight: w @ given) for name, weight in weights.items()}
    with torch.inference_mode():
        return in_turns(sessions, dict.fromkeys(sessions, x), runs=setting.pick(100, 300))


def _gain(times: Mapping[str, Floats], dense: str, name: str) -> Spread:
    """How many times faster, round by round."""
    return middle(times[dense] / times[name])


def _over(times: Mapping[str, Floats], way: str, share: float) -> Spread:
    return middle(times[f"torch {way} {share}"] / times["torch dense"])


def crossing(points: list[tuple[float, Spread]]) -> float | None:
    """Where the line through the medians comes to 1 for good; None where it does not."""
    if points[-1][1].value > 1:
        return None
    for (x0, a), (x1, b) in reversed(list(pairwise(points))):
        if a.value > 1:
            return x0 + (x1 - x0) * (a.value - 1) / (a.value - b.value)
    return points[0][0]


def _findings(rows: list[tuple], shares: tuple[float, ...], break_even: Mapping[str, float | None]) -> list[str]:
    """What the numbers say, whatever they are."""
    last = {row[0]: row[-1] for row in rows}
    masks = [v for name, v in last.items() if "torch" not in name and "removed" not in name]
    gone = [v.value for name, v in last.items() if "removed" in name]
    told = [v.value for v in masks]
    faster = sum(v.low > 1.1 for v in masks)
    slow = [way for way in break_even if next(row[1].value for row in rows if way in row[0]) < 1]
    return [
        f"In the two runtimes zeros in a dense file {'gain nothing' if not faster else 'gain something in ' + str(faster) + ' cases'}, whatever their "
        f"pattern: × {min(told):.2f} to × {max(told):.2f} at {100 * shares[-1]:g} % zeros. As many rows **removed**: × {min(gone):.1f} to × {max(gone):.1f}.",
        f"In torch’s sparse formats the talk’s warning {'holds' if slow else 'does not hold here'}: at {100 * shares[0]:g} % zeros "
        f"{' and '.join(slow) or 'neither'} {'are' if len(slow) > 1 else 'is'} slower than dense.",
        "Effective MACs of a mask are an estimate of what could be saved; these tables are what is.",
    ]
