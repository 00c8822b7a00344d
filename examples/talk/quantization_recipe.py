"""The recipe of quantization, drawn, and carried out step by step on the digits network."""

from __future__ import annotations

import paredown as pare
from paredown.recipes import digits
from talk import draw, nets
from talk.page import Column, Page, Setting, Spread, Table, Text, spread

STEPS = [
    ("Choose the scheme", "int8 static, for ONNX Runtime on x86"),
    ("Fuse", "batch norm into the weights, ReLU into the layer"),
    ("Observe", "ranges of activations on held-out images"),
    ("Calibrate, or train", "scales and zero points; QAT trains them along"),
    ("Convert", "weights become integer codes, stored once"),
    ("Evaluate the file", "parity, bytes, accuracy and latency in its runtime"),
]


def build(setting: Setting) -> Page:
    """Static INT8 from the trained network to the measured file."""
    program = nets.program(setting)
    quantized = pare.quantize(program, calibrate=digits.calibration_batches)
    before = pare.export(program, setting.folder / "recipe-fp32.onnx")
    after = pare.export(quantized, setting.folder / "recipe-int8.onnx")
    parity = pare.check(after, quantized, digits.calibration_batches)
    measured = pare.measure(
        after, digits.calibration_batches, baseline=before, memory=False, runs=setting.pick(100, 200),
        evaluate=lambda predict: digits.evaluate(predict, digits.test_batches()), units={"accuracy": "%"},
    )  # fmt: skip
    return Page(
        title="The recipe of quantization",
        told=("A slide with a recipe, which was a picture.",),
        parts=(
            draw.flow(STEPS, caption="The recipe, as paredown follows it"),
            Text(text="**Fuse.** " + _fused(program, quantized)),
            Text(text="**Observe, calibrate, convert.** What every weight became:"),
            _codes(quantized),
            Text(text="**Evaluate the file.** Whatever the simulation promised, the claim is made on the file:"),
            _file(before, measured, parity, nets.accuracy(before), nets.accuracy(quantized)),
        ),
        differ=(
            "The talk’s slide was a picture, so the steps are our reading of it. What we add is the last one: the file is opened in the runtime that will execute it, and what stayed float there is named.",
            f"Operations that stayed float: {', '.join(parity.float_nodes) or 'none'}; in int8: {len(parity.int8_nodes)}.",
        ),
        not_tested=("A phone, and any other runtime than ONNX Runtime on this processor.",),
        shortened=f"the network was trained for {nets.base_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _fused(program: pare.Program, quantized: pare.Quantized) -> str:
    before = sum("batch_norm" in str(n.target) for n in program.eval_graph.graph.nodes)
    after = sum("batch_norm" in str(n.target) for n in quantized.module.graph.nodes)
    return f"{before} batch norms before, {after} after: each is a scale and a shift per channel, which the weights of the convolution before it take over."


def _codes(quantized: pare.Quantized) -> Table:
    rows = [
        (name, p.bits, f"{int(p.codes.min())} … {int(p.codes.max())}", p.scales.numel(), float(p.scales.min()), float(p.scales.max()))
        for name, p in quantized.weights.items()
    ]  # fmt: skip
    return Table(
        caption="Weights as codes: w ≈ s · q, one scale per output channel",
        columns=(
            Column(title="Weight"), Column(title="Bits", mark="counted"), Column(title="Codes", mark="counted"), Column(title="Scales", mark="counted"),
            Column(title="Smallest scale", mark="counted"), Column(title="Largest scale", mark="counted"),
        ),
        rows=rows,
    )  # fmt: skip


def _file(before: pare.Artifact, measured: dict, parity: pare.Check, dense: float, simulated: float) -> Table:
    accuracy, speedup = measured["accuracy"], measured["speedup"]
    return Table(
        caption=f"{accuracy.n} test images; latency of one image: {measured['latency_ms'].protocol}",
        columns=(Column(title="Of the file"), Column(title="float32", mark="measured"), Column(title="int8", mark="measured")),
        rows=[
            ("Bytes", before.size_bytes, measured["bytes"].value),
            ("Accuracy, %", round(dense, 2), spread(accuracy)),
            ("Accuracy of the simulation in PyTorch, %", "–", round(simulated, 2)),
            ("Latency, ms", spread(measured["baseline_latency_ms"]), spread(measured["latency_ms"])),
            ("Times faster", "–", Spread(value=speedup.value, low=speedup.low, high=speedup.high)),
            ("Smallest cosine of file and simulation", "–", f"{parity.cosine:.6f}"),
        ],
    )  # fmt: skip
