"""Layers on codes in the form that ONNX Runtime has fast kernels for: the same codes in the file, the same result, bit for bit.

For four kinds of layers its int8 kernels are far from what they could be, some slower than its float ones. Processor
milliseconds, ONNX Runtime 1.32 on x86 with VNNI, one thread, float / int8 as exported / int8 in the form written here:

| form | layer | float | as it was | here |
|---|---|---|---|---|
| frames | three 3×3×3, 3 and 16 → 16 channels, 16 × 56² | 2.4 | 11.8 | 1.9 |
| frames | three 3×3×3, 32 → 32 channels, 8 × 28² | 14.5 | 6.1 | 3.1 |
| frames | three 3×1×1, 144 and 64 → 64 channels, 8 × 56² | 20.5 | 6.6 | 5.9 |
| repeat | 7×7, stride 2, 48 → 96 channels in 48 groups, 64² | 1.1 | 7.5 | 0.6 |
| merge | 3×3, 64 channels in 32 groups, 56² | 1.2 | 3.6 | 0.9 |
| merge | 3×3, 128 channels in 32 groups (ResNeXt), 28² | 0.9 | 1.3 | 0.5 |
| gelu | two 1×1 around a GELU, 48 and 144 channels, 64² | 3.0 | 2.9 | 2.2 |

Whole networks, from file to file: FastViT-T8 20.4 / 33.0 / 14.4, ResNeXt-50 88.7 / 42.2 / 31.4, R3D-18 453 / 146 / 105. Depthwise
convolutions in time and space take as long as in float (4.3 and 4.3), those of 1×1×1 a third of it; both stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from paredown.export.onnx_passes import constant, initializer, root

GROUP_INPUTS = 16
"""Groups are merged until one reads so many channels: the kernel takes a fixed time per group and pixel, which weighs less beyond."""
Run = Callable[..., ir.Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A convolution between codes."""

    node: ir.Node
    inputs: ir.Node
    """DequantizeLinear of its input."""
    weight: ir.Node
    """DequantizeLinear of its weight."""
    shape: tuple[int, ...]
    """Of the weight: [outputs, inputs per group, *kernel]."""
    groups: int


def rewrite(model: ir.Model, forms: Sequence[str]) -> int:
    """Write layers in the given forms ("frames", "repeat", "merge", "gelu"), in place; returns how many were."""
    done = sum(_alone(model, node) for node in list(model.graph)) if "gelu" in forms else 0
    for form, change in (("frames", _frames), ("repeat", _repeat), ("merge", _merge)):
        if form in forms:
            done += sum(change(model, layer) for node in list(model.graph) if (layer := _layer(node)) is not None)
    return done


def _layer(node: ir.Node) -> _Layer | None:
    """The convolution, where its input, weight and result are codes: one that computes in float is left as it is."""
    if node.op_type != "Conv" or node.domain or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    x, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
    readers = [user.op_type for user, _ in node.outputs[0].uses()]
    if x is None or weight is None or node.outputs[0].is_graph_output() or set(readers) != {"QuantizeLinear"}:
        return None
    if (x.op_type, weight.op_type) != ("DequantizeLinear", "DequantizeLinear") or len(x.inputs) < 3:
        return None
    shape = _weight_shape(weight)
    zero = constant(x.inputs[2])
    if shape is None or zero is None or zero.size != 1:
        return None
    return _Layer(node=node, inputs=x, weight=weight, shape=shape, groups=node.attributes.get_int("group", 1))


def _weight_shape(weight: ir.Node) -> tuple[int, ...] | None:
    """Of int8 codes that are a constant, or a constant in another form."""
    codes = weight.inputs[0]
    array = constant(root(codes))
    if codes is None or array is None or array.dtype != np.int8:
        return None
    made = codes.producer()
    shape = array.shape if made is None else constant(made.inputs[1]) if made.op_type == "Reshape" else None
    return None if shape is None else tuple(int(n) for n in shape)


def _frames(model: ir.Model, layer: _Layer) -> int:
    """A convolution in three dimensions as one in two: over time and pixels in a row, or with the frames that a result sees as channels.

    y[t] = Σ_d W[:, :, d] * x[s·t + d·r]   →   one kernel [outputs, kt · inputs, kh, kw] on kt · inputs channels, N · T pictures
    """
    node = layer.node
    x, y = (v.shape for v in (node.inputs[0], node.outputs[0]) if v is not None)
    inputs, kernel = layer.shape[1], layer.shape[2:]
    if len(kernel) != 3 or x is None or y is None or not all(isinstance(n, int) for n in (*x[1:], *y[1:])):
        return 0
    stride, spread = (list(node.attributes.get_ints(n, [1] * 3)) for n in ("strides", "dilations"))
    pads = list(node.attributes.get_ints("pads", [0] * 6))
    alone = layer.groups > 1 and inputs == 1
    if math.prod(kernel) == 1 or (alone and kernel[0] > 1 and kernel[1:] != (1, 1)):
        return 0  # no faster in another form
    sizes, steps = [int(n) for n in (*x[1:], *y[1:])], _Steps(stride, spread, pads)
    if kernel[1:] == (1, 1) and stride[1:] == [1, 1] and not any(pads[i] for i in (1, 2, 4, 5)):
        return _row_of_pixels(model, layer, sizes, steps)
    return _pictures(model, layer, sizes, steps)


@dataclass(frozen=True, slots=True)
class _Steps:
    """Over time, height and width."""

    strides: list[int]
    dilations: list[int]
    pads: list[int]
    """In front of the three axes, then behind them."""


def _row_of_pixels(model: ir.Model, layer: _Layer, sizes: list[int], steps: _Steps) -> int:
    """A kernel over time alone: pictures are laid out as rows, which moves nothing. `sizes` are C, T, H, W and those of the result."""
    run = _runner(model, before=layer.node)
    rows = run("Reshape", layer.inputs.inputs[0], [-1, sizes[0], sizes[1], sizes[2] * sizes[3]])
    weight = run("Reshape", layer.weight.inputs[0], [*layer.shape[:3], 1])
    attributes = {
        "strides": [steps.strides[0], 1], "dilations": [steps.dilations[0], 1], "pads": [steps.pads[0], 0, steps.pads[3], 0], "group": layer.groups,
    }  # fmt: skip
    result = _replaced(run, layer, rows, weight, attributes)
    return _given_back(model, layer, result, lambda after, code: after("Reshape", code, [-1, *sizes[4:]]))


def _pictures(model: ir.Model, layer: _Layer, sizes: list[int], steps: _Steps) -> int:
    """Every frame of the result is a picture of its own, whose channels are those of the kt frames that it sees."""
    outputs, inputs, *kernel = layer.shape
    channels, _, height, width, _, frames, *_ = sizes
    run = _runner(model, before=layer.node)
    codes = run("Transpose", layer.inputs.inputs[0], perm=[0, 2, 1, 3, 4])
    if steps.pads[0] or steps.pads[3]:
        ends = np.array([0, steps.pads[0], 0, 0, 0, 0, steps.pads[3], 0, 0, 0])
        codes = run("Pad", codes, ends, _scalar(layer.inputs.inputs[2]))
    stride = steps.strides[0]
    if kernel[0] > 1 or stride > 1:
        starts = [d * steps.dilations[0] for d in range(kernel[0])]
        seen = [run("Slice", codes, [s], [s + (frames - 1) * stride + 1], [1], [stride]) for s in starts]
        if layer.groups > 1:  # those of a group lie together
            seen = [run("Reshape", s, [0, 0, layer.groups, inputs, height, width]) for s in seen]
        codes = run("Concat", *seen, axis=3 if layer.groups > 1 else 2) if len(seen) > 1 else seen[0]
    flat = run("Reshape", codes, [-1, kernel[0] * channels, height, width])
    turned = run("Transpose", layer.weight.inputs[0], perm=[0, 2, 1, 3, 4])
    weight = run("Reshape", turned, [outputs, kernel[0] * inputs, *kernel[1:]])
    attributes = {
        "strides": steps.strides[1:], "dilations": steps.dilations[1:], "pads": [steps.pads[i] for i in (1, 2, 4, 5)], "group": layer.groups,
    }  # fmt: skip
    result = _replaced(run, layer, flat, weight, attributes)

    def back(after: Run, code: ir.Value) -> ir.Value:
        pictures = after("Reshape", code, [-1, *(sizes[i] for i in (5, 4, 6, 7))])
        return after("Transpose", pictures, perm=[0, 2, 1, 3, 4])

    return _given_back(model, layer, result, back)


def _given_back(model: ir.Model, layer: _Layer, result: ir.Value, back: Callable[[Run, ir.Value], ir.Value]) -> int:
    """The codes of the result in the form that its readers know, in place of the layer's."""
    for reader in list(dict.fromkeys(user for user, _ in layer.node.outputs[0].uses())):
        after = _runner(model, before=reader)
        code = after("QuantizeLinear", result, *reader.inputs[1:])
        reader.outputs[0].replace_all_uses_with(back(after, code))
        model.graph.remove(reader, safe=True)
    model.graph.remove(layer.node, safe=True)
    return 1


def _repeat(model: ir.Model, layer: _Layer) -> int:
    """Several outputs of every channel: channels are repeated on codes, so that each output filters one alone."""
    outputs, inputs, *_ = layer.shape
    if layer.groups == 1 or inputs != 1 or outputs == layer.groups:
        return 0
    run = _runner(model, before=layer.node)
    order = np.repeat(np.arange(layer.groups), outputs // layer.groups)
    repeated = run("Gather", layer.inputs.inputs[0], order, axis=1)
    result = _replaced(run, layer, repeated, layer.weight.inputs[0], {**_attributes(layer.node), "group": outputs})
    _swap(model, layer.node, result)
    return 1


def _merge(model: ir.Model, layer: _Layer) -> int:
    """Narrow groups merged into fewer: each output has codes of 0 for what it does not read. The file holds the weight as it was.

    Groups of an odd number of inputs stay, for their neighbours would be others (see quantize.pairs).
    """
    outputs, inputs, *kernel = layer.shape
    times = max(
        (r for r in range(1, layer.groups + 1) if layer.groups % r == 0 and r * inputs <= GROUP_INPUTS), default=1
    )
    if times == 1 or inputs % 2:
        return 0
    run = _runner(model, before=layer.node)
    left, each, row = layer.groups // times, outputs // layer.groups, inputs * math.prod(kernel)
    rows = run("Reshape", layer.weight.inputs[0], [left, times, each, row])
    rows = run("Transpose", rows, perm=[0, 2, 1, 3])
    # A row of `row` codes and times · row zeros, laid out again in rows of times · row: each begins `row` later than the one before.
    rows = run("Pad", rows, [0, 0, 0, 0, 0, 0, 0, times * row])
    rows = run("Slice", run("Reshape", rows, [left * each, -1]), [0], [times * times * row], [1])
    rows = run("Transpose", run("Reshape", rows, [left, each, times, times * row]), perm=[0, 2, 1, 3])
    weight = run("Reshape", rows, [outputs, times * inputs, *kernel])
    result = _replaced(run, layer, layer.inputs.inputs[0], weight, {**_attributes(layer.node), "group": left})
    _swap(model, layer.node, result)
    return 1


def _alone(model: ir.Model, node: ir.Node) -> int:
    """A GELU of codes reads one value: of a DequantizeLinear with two readers the runtime makes two, and sees no GELU then.

    A Clip without bounds changes no value and is not taken out.
    """
    source = node.inputs[0].producer() if node.op_type == "Erf" and node.inputs[0] is not None else None
    x = source.inputs[0] if source is not None and source.op_type in ("Div", "Mul") else None
    made = x.producer() if x is not None else None
    if x is None or made is None or made.op_type != "DequantizeLinear" or source is None:
        return 0
    factors = [user for add, _ in node.outputs[0].uses() for user, _ in add.outputs[0].uses()]
    readers = [user for user in (source, *factors) if x in user.inputs]
    if len(readers) != 2:
        return 0
    clipped = _runner(model, before=source)("Clip", x)
    for reader in readers:
        reader.replace_input_with(list(reader.inputs).index(x), clipped)
    return 1


def _replaced(
    run: Run, layer: _Layer, codes: ir.Value, weight: ir.Value | None, attributes: dict[str, Any]
) -> ir.Value:
    """The convolution anew, on these codes and this weight."""
    x = run("DequantizeLinear", codes, *layer.inputs.inputs[1:])
    held = run("DequantizeLinear", weight, *layer.weight.inputs[1:], axis=0)
    return run("Conv", x, held, *layer.node.inputs[2:], **attributes)


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _swap(model: ir.Model, node: ir.Node, result: ir.Value) -> None:
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(result)
    model.graph.remove(node, safe=True)


def _scalar(value: ir.Value | None) -> NDArray[Any]:
    array = constant(value)
    assert array is not None
    return array.reshape(())


def _runner(model: ir.Model, *, before: ir.Node) -> Run:
    """A function that adds an op in front of a node; lists and arrays become constants."""

    def run(op: str, *inputs: Any, **attributes: Any) -> ir.Value:
        base = str(before.outputs[0].name)
        held = [
            initializer(model, f"{base}_{op.lower()}", np.array(v)) if isinstance(v, list | np.ndarray) else v
            for v in inputs
        ]
        node = ir.node(op, held, attributes)
        model.graph.insert_before(before, node)
        return node.outputs[0]

    return run
