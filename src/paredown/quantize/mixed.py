"""Mixed precision: bits per layer within a budget of bytes or bit operations, from measured sensitivity, solved exactly."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.allocate.knapsack import knapsack
from paredown.errors import NothingToDo, UsageError
from paredown.plan import Plan
from paredown.program import Inputs, Program
from paredown.prune.nouns import Pruned
from paredown.quantize.batches import Batches, length, reusable, tensors_of
from paredown.quantize.culprits import Mixed, named_layers, some
from paredown.quantize.decompose import fetch
from paredown.quantize.lanes import Lane, Lanes, Layer, cloned
from paredown.quantize.nouns import Quantized
from paredown.quantize.numerics import fake_quantize
from paredown.quantize.packed import packed_length
from paredown.quantize.rounding import METHODS, moments_of, rounded_rows
from paredown.quantize.schemes import levels_at, weight_range
from paredown.quantize.static import Calibrated, calibrated, quantize

Errors = Mapping[str, Mapping[int, float | None]]
"""Weight → {bits: what it costs when it alone has so many}."""
BITS = (8, 6, 4, 3, 2)
"""Widths that a layer may be given, unless others are asked for."""
SCALE_BYTES = 4
"""Of a float32 scale, one per output channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """One layer at one width: what it costs, and what it does to the output by itself."""

    layer: str
    bits: int
    size_bytes: int
    """Codes and float32 scales, as `save_packed` stores them."""
    bops: int
    """Bit operations of one sample: MACs × bits of the weight × bits of the activation (32 where that is float)."""
    error: float
    """Mean squared error of the network's output over its mean square, on choosing data, all other layers in float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A network at some widths, measured as a whole."""

    bits: Mapping[str, int]
    size_bytes: int
    bops: int
    predicted_error: float
    """The sum of the layers' own errors: *estimated*, what the program minimises."""
    error: float
    """That of all of them together, activations quantized as well, on choosing data: *measured*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """Bits per layer within a budget, beside the same number of bits everywhere."""

    quantized: Quantized
    plan: Plan
    """`schemes` says w4a8 and the like per weight."""
    mixed: Spread
    uniform: Spread | None
    """The widest equal width that keeps the budget; None where none does."""
    widths: tuple[Width, ...]
    """All that was measured."""
    exact: bool
    """Whether the program was solved to the end: no other choice has a lower `predicted_error` within the budget."""
    budget: int
    kind: Literal["size_bytes", "bops"]


def allot(
    tuned: Pruned | Program,
    *,
    calibrate: Batches,
    size_bytes: int | None = None,
    bops: int | None = None,
    as_uniform: int | None = None,
    widths: Sequence[int] = BITS,
    scheme: str = "int8",
    repair: Sequence[str] = (),
    sensitivity: Errors | None = None,
    **options: Any,
) -> Allotment:
    """Quantize with bits per layer that keep a budget and lose least.

        min Σ_l E(l, b_l)  over one b_l per layer,  Σ_l cost(l, b_l) ≤ budget

    E(l, b) is measured: the squared error of the output, over its mean square, on 64 samples of `calibrate` when the weight
    of layer l alone has b bits, rounded as `repair` says (gptq, adaround or to the nearest). That errors add up is an
    assumption; the result is measured as a whole, as is the uniform one. The integer program is a multiple-choice knapsack,
    solved exactly (`paredown.allocate.knapsack`). `sensitivity` {weight: {bits: error}} takes the place of measuring, where errors are
    known for every layer and width, in one unit of any kind. Exactly one budget: `size_bytes` of the codes and scales of all layers, `bops`
    of one sample, or `as_uniform`, the bytes that so many bits everywhere take. `scheme` says what activations have, `options`
    are those of `quantize`. HAWQ (Dong et al. 2019, arXiv 1911.03852) has the same program, with a Hessian trace for E.

    Raises UsageError (no budget or two, widths that are none), NothingToDo where the narrowest widths are over the budget,
    with their plan as `nearest`; and what `quantize` raises.

    >>> from torch import nn
    >>> from paredown.program import capture
    >>> net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(64, 64)
    >>> found = allot(capture(net, x[:2]), calibrate=[x], as_uniform=4)
    >>> found.exact, found.mixed.size_bytes <= found.uniform.size_bytes, found.plan.schemes == dict(found.plan.schemes)
    (True, True, True)
    """
    _check(size_bytes, bops, as_uniform, widths)
    calibrate = reusable(calibrate, options.get("num_samples"))
    base = calibrated(
        tuned, target=options.pop("target", "onnxruntime-x86"), calibrate=calibrate, scheme=scheme, **options
    )
    calls = some(calibrate)
    options = {**options, "target": base.target, "calibrate": calibrate, "scheme": scheme, "repair": repair}
    wide, rounding = sorted(set(widths), reverse=True), next((r for r in repair if r in METHODS), "")
    table = measured_widths(base, calls, wide, rounding, sensitivity)
    kind: Literal["size_bytes", "bops"] = "size_bytes" if bops is None else "bops"
    groups = [[w for w in table if w.layer == name] for name in dict.fromkeys(w.layer for w in table)]
    limit = bops if bops is not None else size_bytes if size_bytes is not None else _of_uniform(groups, as_uniform or 0)
    solved = knapsack([[getattr(w, kind) for w in g] for g in groups], [[w.error for w in g] for g in groups], limit)
    if solved is None:
        raise _too_small(groups, kind, limit, base)
    chosen = [g[o] for g, o in zip(groups, solved.chosen, strict=True)]
    equal = [[w for g in groups for w in g if w.bits == b] for b in sorted(set(widths))]
    fitting = [e for e in equal if sum(getattr(w, kind) for w in e) <= limit]
    quantized = quantize(tuned, bits=_bits(chosen), **options)
    wanted = _outputs(Mixed(base, frozenset(), None), calls)
    plain = quantize(tuned, bits=_bits(fitting[-1]), **options) if fitting else None
    return Allotment(
        quantized=quantized,
        plan=_plan(chosen, base, kind, limit),
        mixed=_spread(chosen, error_of(quantized, calls, wanted)),
        uniform=None if plain is None else _spread(fitting[-1], error_of(plain, calls, wanted)),
        widths=tuple(table),
        exact=solved.exact,
        budget=limit,
        kind=kind,
    )


def _check(size_bytes: int | None, bops: int | None, as_uniform: int | None, widths: Sequence[int]) -> None:
    given = [v for v in (size_bytes, bops, as_uniform) if v is not None]
    if len(given) != 1 or isinstance(given[0], bool) or not isinstance(given[0], int) or given[0] < 1:
        msg = f"exactly one of size_bytes, bops and as_uniform must be given, an integer ≥ 1. Got {size_bytes}, {bops}, {as_uniform}."
        raise UsageError(msg)
    if not widths or any(isinstance(b, bool) or b not in range(1, 9) for b in widths):
        msg = f"widths must be integers from 1 to 8, at least one. Got {list(widths)}."
        raise UsageError(msg)
    if as_uniform is not None and as_uniform not in widths:
        msg = f"as_uniform must be one of the widths {list(widths)}. Got {as_uniform}."
        raise UsageError(msg)


def _of_uniform(groups: Sequence[Sequence[Width]], bits: int) -> int:
    return sum(w.size_bytes for g in groups for w in g if w.bits == bits)


def _too_small(groups: Sequence[Sequence[Width]], kind: str, limit: int, base: Calibrated) -> NothingToDo:
    least = [min(g, key=lambda w: float(getattr(w, kind))) for g in groups]
    total = sum(getattr(w, kind) for w in least)
    msg = f"the budget must hold the narrowest widths, {total:,} {kind}. Got {limit:,}. Give more, allow fewer bits, or prune first."
    return NothingToDo(msg, nearest=_plan(least, base, kind, total))


def _bits(chosen: Sequence[Width]) -> dict[str, int]:
    return {w.layer: w.bits for w in chosen}


def _plan(chosen: Sequence[Width], base: Calibrated, kind: str, limit: int) -> Plan:
    inputs = {name: _activation_bits(base, layer) for name, layer in named_layers(base).items()}
    schemes = {w.layer: f"w{w.bits}a{inputs[w.layer]}" for w in chosen}
    return Plan(keep={}, schemes=schemes, made_by={"mixed precision": kind, "budget": limit, "scheme": base.scheme})


def _spread(chosen: Sequence[Width], error: float) -> Spread:
    return Spread(
        bits=_bits(chosen),
        size_bytes=sum(w.size_bytes for w in chosen),
        bops=sum(w.bops for w in chosen),
        predicted_error=sum(w.error for w in chosen),
        error=error,
    )


# ---------------------------------------------------------------------------------------------------------- sensitivity


def lacking(names: Iterable[str], widths: Sequence[int], known: Errors) -> str:
    """The first weight and width without a known error; "" where there is none.

    >>> lacking(["a"], [8, 4], {"a": {8: 0.0}}), lacking(["a"], [8], {"a": {8: 0.0}})
    ('a at 4 bits', '')
    """
    holes = (f"{n} at {b} bits" for n in names for b in widths if known.get(n, {}).get(b) is None)
    return next(holes, "")


def measured_widths(
    base: Calibrated, calls: Sequence[Inputs], widths: Sequence[int], rounding: str, known: Errors | None = None
) -> list[Width]:
    """Every layer at every width. The float network is run once; behind a layer, once for each of its widths.

    Errors that are `known`, of all layers at all widths, are taken as they are. Raises UsageError where some are missing.
    """
    if known is not None and (hole := lacking(named_layers(base), widths, known)):
        msg = f"sensitivity must hold every layer at every width. Got none for {hole}. Measure it, or leave sensitivity out."
        raise UsageError(msg)
    layers, names = named_layers(base), {x.node: n for n, x in named_layers(base).items()}
    nodes = [n for n in base.prepared.graph.nodes if n.op != "output"]
    lanes = [Lane(base.prepared, pytree.tree_leaves(pytree.tree_map(cloned, c)), None) for c in calls]
    wanted = _outputs(Mixed(base, frozenset(), None), calls)
    found = []
    with torch.no_grad():
        for at, node in enumerate(nodes):
            for lane in lanes:
                lane.env[node] = lane.run_node(node)
            if node in names:
                layer = layers[names[node]]
                macs = _macs(layer, lanes[0].env[node], calls[0])
                weight = fetch(base.prepared, layer.weight)
                for bits, error in _errors(
                    base,
                    layer,
                    lanes,
                    widths,
                    rounding,
                    wanted,
                    nodes[at:],
                    None if known is None else known[names[node]],
                ):
                    found.append(
                        Width(
                            layer=names[node],
                            bits=bits,
                            size_bytes=packed_length(weight.numel(), bits, levels_at(bits)) + SCALE_BYTES * len(weight),
                            bops=macs * bits * _activation_bits(base, layer),
                            error=error,
                        )
                    )
            for lane in lanes:
                lane.drop_after(node)
    return found


def _errors(
    base: Calibrated, layer: Layer, lanes: Sequence[Lane], widths: Sequence[int], rounding: str, wanted: Sequence[Tensor],
    rest: Sequence[fx.Node], known: Mapping[int, float | None] | None,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """What each width does to the output: known, or measured by running what comes behind the layer."""
    if known is not None:
        yield from ((bits, float(known[bits] or 0.0)) for bits in widths)
        return
    for bits, weight in _rounded(base, layer, lanes, widths, rounding):
        outs = [out for lane in lanes for out in _rest(lane, layer, weight, rest)]
        yield bits, _relative(outs, wanted)


def _rounded(
    base: Calibrated, layer: Layer, lanes: Sequence[Lane], widths: Sequence[int], rounding: str
) -> Iterator[tuple[int, Tensor]]:
    """The layer's weight at each width."""
    from paredown.quantize.observe import WEIGHT_OBSERVERS

    weight = fetch(base.prepared, layer.weight).detach()
    own: Any = fetch(base.prepared, layer.observer)
    rows = weight.double().reshape(layer.groups, weight.shape[0] // layer.groups, -1)
    sums = moments_of(layer, [Lanes(whole=lane, coded=lane) for lane in lanes], rows) if rounding else []
    for bits in widths:
        low, high = weight_range(bits, levels_at(bits))
        observer = WEIGHT_OBSERVERS["tensor" if own.one_scale else "channel"](
            dtype=torch.int8,
            qscheme=own.qscheme,
            ch_axis=own.ch_axis,
            quant_min=low,
            quant_max=high,
            levels=levels_at(bits),
            pair_sum=own.pair_sum,
        )
        observer.floor = own.floor
        observer(weight)
        if not rounding:
            yield bits, fake_quantize(weight, observer)
            continue
        parts = rounded_rows(rows, sums, observer, layer.bias is not None, rounding, 0.01)
        yield bits, torch.cat([p.codes * p.scales[:, None] for p in parts]).float().reshape(weight.shape)


def _rest(lane: Lane, layer: Layer, weight: Tensor, nodes: Sequence[fx.Node]) -> list[Tensor]:
    """The outputs when the layer has this weight; the lane itself stays where it is."""
    fork = copy.copy(lane)
    fork.env = {**lane.env, layer.use.weight: weight}
    for node in nodes:
        fork.next(node, keep=any(u.op == "output" for u in node.users))
    last = next(n for n in reversed(layer.node.graph.nodes) if n.op == "output")
    return [t.double() for t in (fork.env[n] for n in last.all_input_nodes) if t.is_floating_point()]


def _macs(layer: Layer, out: Tensor, call: Inputs) -> int:
    """Multiply-accumulates of one sample."""
    return out.numel() // max(length(call), 1) * math.prod(layer.use.shape[1:])


def _activation_bits(base: Calibrated, layer: Layer) -> int:
    """Of what the layer reads; 32 where that is float."""
    source = layer.source
    observer: Any = fetch(base.prepared, str(source.target)) if source.op == "call_module" else None
    if not hasattr(observer, "calculate_qparams"):
        return 32
    return int(observer.quant_max - observer.quant_min).bit_length()


def _outputs(predict: Any, calls: Sequence[Inputs]) -> list[Tensor]:
    with torch.no_grad():
        return [
            t.double() for args, kwargs in calls for t in tensors_of(predict(*args, **kwargs)) if t.is_floating_point()
        ]


def error_of(thing: Quantized | Pruned, calls: Sequence[Inputs], wanted: Sequence[Tensor]) -> float:
    """Mean squared error of the network's output over the mean square of the wanted one."""
    return _relative(_outputs(thing.module, calls), wanted)


def _relative(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    away = sum(float((a - b).square().sum()) for a, b in zip(got, wanted, strict=True))
    return away / max(sum(float(b.square().sum()) for b in wanted), 1e-30)
