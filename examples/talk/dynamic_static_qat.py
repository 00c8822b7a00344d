"""Dynamic, static, and trained quantization compared, on files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

import paredown as pare
from paredown.recipes import digits
from talk import nets
from talk.page import Cell, Column, Page, Setting, Table, over_seeds, spread

Make = Callable[[Setting, int], nn.Module]
SCHEMES = {
    "int8-dynamic": "dynamic: weights in int8, ranges of activations found at run time",
    "int8": "static: ranges of activations calibrated after training",
    "int8, trained": "QAT: the rounding is in the forward pass while training",
    "w4": "weights alone in 4 bits, computed in float",
    "w4a8": "static, 4-bit weights",
    "w4a8, trained": "QAT, 4-bit weights",
    "w4a4": "static, 4-bit weights and activations, in kernels of 8 bits",
    "w4a4, trained": "QAT, 4-bit weights and activations, in kernels of 8 bits",
    "ternary, trained": "QAT, weights −1, 0, 1",
}
QUICK = ("int8-dynamic", "int8", "int8, trained", "w4", "w4a8", "w4a8, trained")
LINEAR = ("int8-dynamic", "int8", "w4")


def build(setting: Setting) -> Page:
    """Every scheme from the same trained networks; all figures are of the exported files."""
    schemes = setting.pick(QUICK, tuple(SCHEMES))
    convolutions = _rows(setting, nets.dense, schemes, "conv")
    layers = _rows(setting, perceptron, LINEAR, "linear")
    seeds = f"540 test images, means over {len(setting.seeds)} seeds"
    return Page(
        title="Dynamic, static and trained quantization",
        told=(
            "**Dynamic**: weights stored quantized, activations at run time. **Static**: activations calibrated after training. **QAT**: numerics modelled "
            "while training. INT8 is 4 times smaller; lower widths are in scope.",
        ),
        parts=(
            _table(f"A network of convolutions, {seeds}; files of ONNX Runtime. Latency of one image, one thread, in turns with the float file: median, 10th to 90th percentile", convolutions),
            _table(f"Three linear layers, 64 → 256 → 256 → 10, {seeds}", layers),
        ),
        differ=_findings(convolutions, layers),
        not_tested=("Phones, and processors with other instructions for int8 than this one (VNNI, dot products).", "Repairs of the rounding (`repair=[\"equalize\", \"gptq\"]`) on this page."),
        shortened=f"{len(setting.seeds)} seeds, {_epochs(setting)} epochs of QAT; without {' · '.join(s for s in SCHEMES if s not in QUICK)}." if setting.quick else "",
    )  # fmt: skip


def perceptron(setting: Setting, seed: int) -> nn.Module:
    """Three linear layers, trained."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return digits.scratch(
        net, epochs=nets.base_epochs(setting), seed=seed, checkpoint=setting.folder / f"linear-{seed}.safetensors"
    )


def _epochs(setting: Setting) -> int:
    return setting.pick(1, 3)


def _rows(setting: Setting, make: Make, schemes: Sequence[str], name: str) -> list[tuple[Cell, ...]]:
    """The float file, then every scheme."""
    floats = [
        pare.export((make(setting, seed), digits.inputs()), setting.folder / f"{name}-float-{seed}.onnx")
        for seed in setting.seeds
    ]
    base = [nets.accuracy(file) for file in floats]
    rows: list[tuple[Cell, ...]] = [
        (
            "float32",
            "as it was trained",
            floats[0].size_bytes,
            1.0,
            over_seeds(base),
            "–",
            _latency(floats[0]),
            "all",
        )
    ]
    for scheme in schemes:
        networks = [_quantized(setting, make, scheme, seed, name) for seed in setting.seeds]
        path = setting.folder / f"{name}-{scheme.replace(', ', '-')}.onnx"
        things = [pare.export(q, path.with_stem(f"{path.stem}-{i}")) for i, q in enumerate(networks)]
        accuracies = [nets.accuracy(thing) for thing in things]
        lost = over_seeds([a - b for a, b in zip(accuracies, base, strict=True)])
        size, latency = things[0].size_bytes, _latency(things[0], floats[0])
        stayed = pare.check(things[0], networks[0], digits.calibration_batches, strict=False).float_nodes
        rows.append(
            (
                scheme,
                SCHEMES[scheme],
                size,
                floats[0].size_bytes / size,
                over_seeds(accuracies),
                lost,
                latency,
                _counted(stayed),
            )
        )
    return rows


def _quantized(setting: Setting, make: Make, scheme: str, seed: int, name: str) -> pare.Quantized:
    bits, _, trained = scheme.partition(", ")
    net = make(setting, seed)
    program = pare.capture(net, digits.inputs())
    data = None if bits in ("int8-dynamic", "w4") else digits.calibration_batches
    if not trained:
        return pare.quantize(program, scheme=bits, calibrate=data)
    return pare.train_quantized(
        program, digits.train_batches, step=digits.step, calibrate=data, scheme=bits, teacher=net, seed=seed,
        epochs=_epochs(setting), checkpoint=setting.folder / f"qat-{name}-{bits}-{seed}.safetensors",
    )  # fmt: skip


def _latency(file: pare.Artifact, baseline: pare.Artifact | None = None) -> Cell:
    measured = pare.measure(file, digits.calibration_batches, baseline=baseline, memory=False, runs=100, seconds=2.0)
    return spread(measured["latency_ms"])


def _counted(nodes: Sequence[str]) -> str:
    """Operations by kind: "Conv 6, Add 2"."""
    kinds = Counter(node.partition(":")[0] for node in nodes)
    return ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()) or "none"


def _table(caption: str, rows: list[tuple[Cell, ...]]) -> Table:
    return Table(
        caption=caption,
        columns=(
            Column(title="Scheme"), Column(title="What it is"), Column(title="Bytes", mark="measured"), Column(title="Times smaller", mark="measured", form=".2f"),
            Column(title="Accuracy, %", mark="measured", form=".2f"), Column(title="Against float, points", mark="measured", form="+.2f"),
            Column(title="Latency, ms", mark="measured"), Column(title="Operations in float", mark="measured"),
        ),
        rows=rows,
    )  # fmt: skip


def _findings(convolutions: list[tuple[Cell, ...]], layers: list[tuple[Cell, ...]]) -> tuple[str, ...]:
    by, linear = {row[0]: row for row in convolutions}, {row[0]: row for row in layers}
    told = [
        f"Static INT8 makes the file {by['int8'][3]:.2f} times smaller, not 4: scales, zero points and the graph itself take bytes too, and in a small network they show.",
        f"Dynamic quantization is for linear and recurrent layers, in paredown as in PyTorch: the network of convolutions shrinks by × {by['int8-dynamic'][3]:.2f}, the linear one by × {linear['int8-dynamic'][3]:.2f}.",
    ]
    for plain in ("int8", "w4a8", "w4a4"):
        if f"{plain}, trained" in by:
            a, b = by[plain][5].value, by[f"{plain}, trained"][5].value
            told.append(f"{plain}: {a:+.2f} points after calibration, {b:+.2f} after training with the rounding.")
    return tuple(told)
