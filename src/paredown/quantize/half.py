"""Half: weights in 16 bits, everything that is computed in float32. The file has half the bytes; x86 is no faster for it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from paredown.errors import NothingToDo, UsageError
from paredown.program import Program
from paredown.quantize.decompose import attach, fetch, folds, own_weights
from paredown.quantize.nouns import Quantized
from paredown.quantize.schemes import HALF
from paredown.score.patterns import as_patterns, matches

aten = torch.ops.aten
LARGEST = 65504.0
"""What float16 holds at most."""
_ROUGH = 1e-3
"""Rounding to 11 bits moves a number by 2⁻¹¹ of it, 4.9e-4, at most; more is lost only of numbers below 2⁻¹⁴, which have fewer bits."""


def quantize_half(program: Program, *, target: str, float_layers: Sequence[str] = ()) -> Quantized:
    """Weights with two axes or more (kernels, matrices, tables) rounded to float16; the rest, and all arithmetic, is float32.

    ŵ = float32(float16(w)), |ŵ - w| ≤ 2⁻¹¹ |w| for 2⁻¹⁴ ≤ |w| ≤ 65504 (IEEE 754 binary16, half to even). Biases, norms and buffers stay as
    they are: they are a small part of the bytes. So does a weight, with a note, that float16 would change by more than its 11 bits: values beyond
    65504, or channels whose values are so small that they lose bits; and one that `float_layers` (fnmatch of parameters or their modules) matches.

    `weights` is empty: there are no codes. No data is read; `program` does not change. Raises NothingToDo where no weight would be halves, UsageError
    for a pattern that matches nothing.

    >>> from paredown.program import capture
    >>> small = quantize_half(capture(nn.Linear(3, 2), torch.zeros(2, 3), train=False), target="onnxruntime-x86")
    >>> bool((small.module.weight == small.program.state["weight"].half().float()).all())
    True
    """
    graph = program.eval_graph.module(check_guards=False)
    fold_batch_norms(graph)
    held: dict[str, Tensor] = {}
    for node in graph.graph.nodes:
        tensor = fetch(graph, str(node.target)) if node.op == "get_attr" else None
        if isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and tensor.dtype == torch.float32 and tensor.numel():
            held[str(node.target)] = tensor.detach()
    asked = _asked(list(held), as_patterns(float_layers))
    made: dict[tuple[int, torch.Size], nn.Parameter] = {}
    whole, halves, notes = 0, 0, []
    for name, weight in held.items():
        key = weight.data_ptr(), weight.shape  # one weight by two names stays one
        whole += 0 if key in made else weight.numel()
        why = "asked for" if name in asked else why_whole(weight)
        if why:
            notes.append(f"{name} stays float32: {why}")
            continue
        halves += 0 if key in made else weight.numel()
        made.setdefault(key, nn.Parameter(weight.half().float(), requires_grad=False))
        _set(graph, name, made[key])
    if not halves:
        msg = f"at least one weight must be written in 16 bits under {HALF}. Got none: {'; '.join(notes) or 'there is no weight with two axes or more'}. Use fp32."
        raise NothingToDo(msg)
    share = f"{halves / whole:.1%} of the weights are in 16 bits; what is computed is float32, so the file is smaller and not faster"
    return Quantized(
        module=graph, program=program, scheme=HALF, target=target, inputs=program.inputs, weights={}, notes=(*program.notes, share, *notes),
    )  # fmt: skip


def fold_batch_norms(graph: fx.GraphModule) -> None:
    """Into the layer that only they read, as an exporter does anyway: what it folds after rounding would be no halves.

    w' = w · γ / √(var + ε), b' = (b - mean) · γ / √(var + ε) + β. Of transposed convolutions those without groups.
    """
    for node in list(graph.graph.nodes):
        layer = node.args[0] if node.target is aten.batch_norm.default else None
        if not isinstance(layer, fx.Node) or len(layer.users) > 1:
            continue
        flat = layer.target is aten.linear.default and layer.meta["val"].dim() == 2
        if not (flat or folds(layer)) or node.args[5]:
            continue
        factors = [n for n in (*layer.args[1:3], *node.args[1:5]) if isinstance(n, fx.Node)]
        if any(n.op != "get_attr" for n in factors):  # worked out: there is nothing to write them to
            continue
        scale, shift, mean, variance = (
            fetch(graph, str(n.target)).detach() if isinstance(n, fx.Node) else None for n in node.args[1:5]
        )
        own_weights(graph, layer)
        names = [str(n.target) if isinstance(n, fx.Node) else None for n in (*layer.args, None)[1:3]]
        weights, bias = (None if n is None else fetch(graph, n).detach() for n in names)
        if weights is None or mean is None or variance is None:
            continue
        transposed = "transpose" in str(layer.target)
        new = fuse_conv_bn_weights(
            weights, bias, mean, variance, float(node.args[7]), scale, shift, transpose=transposed
        )
        assert names[0] is not None
        _set(graph, names[0], new[0])
        if names[1] is not None:
            _set(graph, names[1], new[1])
        else:
            with graph.graph.inserting_before(layer):
                held = graph.graph.get_attr(
                    attach(graph, f"{names[0].rpartition('.')[0] or layer.name}.bias", new[1].detach())
                )
            layer.args = (*layer.args[:2], held, *layer.args[3:])
        node.replace_all_uses_with(layer)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _set(graph: fx.GraphModule, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    setattr(graph.get_submodule(path), leaf, parameter)


def in_halves(quantized: Quantized, name: str) -> bool:
    """Whether the weight of that name was rounded to float16."""
    try:
        held = quantized.module.get_parameter(name).detach()
    except AttributeError:
        return False
    return bool((held.half().float() == held).all())


def why_whole(weight: Tensor) -> str:
    """Why float16 cannot hold a weight to 11 bits; "" where it can.

    >>> why_whole(torch.ones(2, 2)), why_whole(torch.full((2, 2), 1e5))[:36]
    ('', 'values up to 1e+05 are beyond 65504,')
    """
    largest = float(weight.abs().max())
    if not largest <= LARGEST:
        return f"values up to {largest:.3g} are beyond 65504, the largest of float16"
    rows = weight.reshape(weight.shape[0], -1)
    # in float64: squares of small numbers are zeros in float32
    lost, size = (t.norm(dim=1, dtype=torch.float64) for t in (rows - rows.half().float(), rows))
    if bool((lost > _ROUGH * size).any()):
        return f"a channel of values of {float(rows.abs().amax(dim=1)[lost > _ROUGH * size].min()):.2g} and less would lose bits in float16"
    return ""


def _asked(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    found: set[str] = set()
    known = {n: {n, n.rpartition(".")[0]} - {""} for n in names}
    for pattern in patterns:
        hit = {n for n, own in known.items() if matches(own, [pattern])}
        if not hit:
            every = sorted({v for own in known.values() for v in own})
            near = difflib.get_close_matches(pattern, every, 3) or every[:3]
            msg = f"float_layers must match parameters or modules of the network. Got {pattern!r}, which matches none; there are {', '.join(near)}."
            raise UsageError(msg)
        found |= hit
    return found
