"""Dynamic, static, and trained quantization compared, on files."""

from __future__ import annotations

from pathlib import Path

import paredown as pare
from paredown.errors import ParedownError
from paredown.recipes import digits
from talk import nets
from talk.page import Cell, Column, Page, Setting, Table, over_seeds, spread

SCHEMES = {
    "int8-dynamic": "dynamic: weights stored in int8, ranges of activations found at run time",
    "int8": "static: ranges of activations calibrated after training",
    "int8, trained": "QAT: the rounding is in the forward pass while training",
    "w4a8": "static, 4-bit weights",
    "w4a8, trained": "QAT, 4-bit weights",
    "w4": "weights alone in 4 bits, computed in float",
    "w4a4": "4-bit weights and activations, static",
    "w4a4, trained": "QAT, 4-bit weights and activations",
    "ternary, trained": "QAT, weights −1, 0, 1",
}


def build(setting: Setting) -> Page:
    """Every scheme from the same trained networks; accuracy of the files where a runtime executes them."""
    rows: list[tuple[Cell, ...]] = []
    dense = [pare.export(_program(setting, seed), setting.folder / f"float-{seed}.onnx") for seed in setting.seeds]
    base = [nets.accuracy(file) for file in dense]
    rows.append(
        (
            "float32",
            "nothing",
            dense[0].size_bytes,
            1.0,
            over_seeds(base),
            over_seeds([0.0] * len(base)),
            "file",
            spread(_latency(dense[0], None)),
            "–",
        )
    )
    for scheme, told in SCHEMES.items():
        found = [_one(setting, scheme, seed) for seed in setting.seeds]
        what, where = found[0]
        if where is None:
            rows.append((scheme, f"{told}. {what}", None, None, None, None, "–", None, "–"))
            continue
        accuracies = [nets.accuracy(f) for f, _ in found]
        lost = over_seeds([a - b for a, b in zip(accuracies, base, strict=True)])
        if isinstance(what, pare.Artifact):
            floats = pare.check(what, where, digits.calibration_batches, strict=False).float_nodes
            rows.append(
                (
                    scheme,
                    told,
                    what.size_bytes,
                    dense[0].size_bytes / what.size_bytes,
                    over_seeds(accuracies),
                    lost,
                    "file",
                    spread(_latency(what, dense[0])),
                    ", ".join(floats) or "none",
                )
            )
        else:
            rows.append(
                (scheme, told, None, None, over_seeds(accuracies), lost, "simulated", None, "all: no runtime has it")
            )
    return Page(
        title="Dynamic, static and trained quantization",
        told=(
            "**Dynamic**: weights stored quantized, activations at run time. **Static**: activations calibrated after training. **QAT**: numerics modelled "
            "while training. INT8 is 4 times smaller; lower widths are in scope.",
        ),
        parts=(
            Table(
                caption=f"The digits network, 540 test images, means over {len(setting.seeds)} seeds. “file”: executed in ONNX Runtime; “simulated”: in PyTorch. Latency of one image, one thread, in turns with the float file: median, 10th to 90th percentile",
                columns=(
                    Column(title="Scheme"), Column(title="What it is"), Column(title="Bytes", mark="measured"), Column(title="Times smaller", mark="measured", form=".2f"),
                    Column(title="Accuracy, %", mark="measured", form=".2f"), Column(title="Against float, points", mark="measured", form="+.2f"),
                    Column(title="Accuracy of"), Column(title="Latency, ms", mark="measured"), Column(title="Operations in float"),
                ),
                rows=rows,
            ),
        ),
        differ=_findings(rows),
        not_tested=("Phones and processors with VNNI or dot-product instructions, where int8 gains more.", "Rounding repairs (`repair=[\"equalize\", \"gptq\"]`) on this page."),
        shortened=f"{len(setting.seeds)} seeds, {_epochs(setting)} epochs of QAT." if setting.quick else "",
    )  # fmt: skip


def _epochs(setting: Setting) -> int:
    return setting.pick(2, 5)


def _program(setting: Setting, seed: int) -> pare.Program:
    return pare.capture(nets.dense(setting, seed), digits.inputs())


def _one(
    setting: Setting, scheme: str, seed: int
) -> tuple[pare.Artifact | pare.Quantized | str, pare.Quantized | None]:
    """(what gives the accuracy: the file, or the simulation where no runtime executes it; what it was made of)."""
    name, _, trained = scheme.partition(", ")
    data = None if name in ("int8-dynamic", "w4") else digits.calibration_batches
    try:
        if trained:
            quantized = pare.train_quantized(
                _program(setting, seed), digits.train_batches, step=digits.step, calibrate=data, scheme=name, seed=seed,
                epochs=_epochs(setting), teacher=nets.dense(setting, seed), checkpoint=setting.folder / f"qat-{name}-{seed}.safetensors",
            )  # fmt: skip
        else:
            quantized = pare.quantize(_program(setting, seed), scheme=name, calibrate=data)
    except ParedownError as error:  # a scheme that this network has no layer for
        return str(error).split(". ")[0], None
    path: Path = setting.folder / f"scheme-{scheme.replace(', ', '-')}-{seed}.onnx"
    try:
        return pare.export(quantized, path), quantized
    except ParedownError:
        return quantized, quantized


def _latency(file: pare.Artifact, baseline: pare.Artifact | None) -> pare.Measured:
    return pare.measure(file, digits.calibration_batches, baseline=baseline, memory=False, runs=60, seconds=2.0)[
        "latency_ms"
    ]


def _findings(rows: list[tuple[Cell, ...]]) -> tuple[str, ...]:
    by = {row[0]: row for row in rows}
    told = []
    if by["int8"][3] is not None:
        told.append(
            f"Static INT8 makes this file {by['int8'][3]:.2f} times smaller, not 4: scales, zero points and the graph itself take bytes too, and in a small network they show."
        )
    for plain in ("int8", "w4a8", "w4a4"):
        a, b = by[plain][5], by[f"{plain}, trained"][5]
        if a is not None and b is not None:
            told.append(
                f"{plain}: {a.value:+.2f} points after calibration, {b.value:+.2f} after training with the rounding."
            )
    told.append(
        "Dynamic quantization is for linear and recurrent layers in most frameworks; a network of convolutions has little that it could change. How much stayed in float is in the last column."
    )
    return tuple(told)
