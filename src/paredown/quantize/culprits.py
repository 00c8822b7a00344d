"""Culprits: the fewest layers that must stay in float for the metric to hold, found without quantizing anew for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.program import Inputs, Program
from paredown.prune.nouns import Pruned
from paredown.quantize.batches import Batches, each, reusable, rows, tensors_of
from paredown.quantize.decompose import fetch, op_name
from paredown.quantize.lanes import Changes, Lane, Layer, cloned, layers_of
from paredown.quantize.nouns import Quantized
from paredown.quantize.numerics import observes_weight
from paredown.quantize.ranges import Watched, apart, range_of
from paredown.quantize.static import Calibrated, calibrated, converted
from paredown.score.patterns import as_patterns
from paredown.target import named

SAMPLES = 64
"""Of the calibration data that layers are ranked on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """A layer, or the layers around a value, and what their rounding does to the network's output."""

    layers: tuple[str, ...]
    """Their weights, by the names that the user's model has for them."""
    share: float
    """Of the squared error of the output on calibration samples that goes away when they alone are in float."""
    extra_bytes: int
    """What their weights take more in float32 than in codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spared:
    """The network with the fewest layers in float that meets the bound, by the simulation."""

    quantized: Quantized
    float_layers: tuple[str, ...]
    ranking: tuple[Culprit, ...]
    """All that was considered, the most harmful first."""
    value: float
    """The metric with those layers in float, of `quantized`."""
    before: float
    """The metric with every layer in codes, as rehearsed."""
    tried: int
    """Evaluations of the metric."""
    extra_bytes: int
    """What the file is larger by: *estimated* from the weights."""


def spare(
    tuned: Pruned | Program,
    *,
    evaluate: Callable[[Callable[..., Any]], float],
    meets: Callable[[float], bool],
    calibrate: Batches,
    target: str = "onnxruntime-x86",
    most: int | None = None,
    **options: Any,
) -> Spared:
    """Quantize, and put the fewest layers back to float for which `meets(evaluate(predict))`.

    Runtimes run a layer on codes only where its inputs and its output are codes, so a value is in float only when every
    layer around it is. Layers, and the layers around each such value, are ranked by what the output's squared error on
    calibration samples loses when they are in float. The smallest prefix of the ranking that meets the bound is found by doubling and bisection;
    then each of its layers is put back into codes if the bound still holds without it. All this is rehearsed; what comes out is
    quantized and evaluated, and where it misses the bound the prefix is searched anew with networks that are. `evaluate` is given
    `predict(*inputs)` and must not see test data: it chooses. `options` are those of `quantize`; `most` bounds the layers.

    >>> import torch
    >>> from torch import nn
    >>> from paredown.program import capture
    >>> net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 8)
    >>> wanted = net(x).detach()
    >>> off = lambda predict: float((predict(x) - wanted).abs().max())
    >>> spare(capture(net, x[:2]), evaluate=off, meets=lambda v: v < 1.0, calibrate=[x]).float_layers
    ()

    Raises NothingToDo where even all layers (or `most`) in float do not meet the bound, or nothing less than all, with the value they reach; UsageError
    where `evaluate` returns no number; and what `quantize` raises.
    """
    given = as_patterns(options.pop("float_layers", ()))
    calibrate = reusable(calibrate, options.get("num_samples"))
    base = calibrated(tuned, target=target, calibrate=calibrate, float_layers=given, **options)
    options["idle_repairs"] = True  # what a layer in float takes away
    layers = named_layers(base)
    made: dict[frozenset[str], Quantized] = {}

    def quantized(key: frozenset[str]) -> Callable[..., Any]:
        made.clear()  # one network at a time
        stay = [*given, *sorted(key)]
        try:
            again = calibrated(tuned, target=target, calibrate=calibrate, float_layers=stay, **options)
            made[key] = converted(again, again.prepared)
        except NothingToDo:  # every layer is in float, and then there is nothing to hand back
            return Mixed(base, frozenset(), None)
        return made[key].module

    rehearsed = _Metric(evaluate, lambda key: Mixed(base, key, Changes()))
    real = _Metric(evaluate, quantized)
    before, chosen, ranking = rehearsed(()), list[str](), tuple[Culprit, ...]()
    if not meets(before):
        ranking = rank(base, calibrate)
        order = _order(ranking)[:most]
        found = _chosen(order, rehearsed, real, meets)
        if found is not None and frozenset(found) not in made:
            quantized(frozenset(found))
        if found is None or not made:
            msg = f"a few layers in float must be enough to meet the bound. Got {real(order):.6g} with {len(order)} of {len(layers)} layers in float, {before:.6g} with none."
            raise NothingToDo(msg)
        chosen = found
    whole = made[frozenset(chosen)] if made else converted(base, base.prepared)
    odd = apart(base.input_range or range_of(()), rehearsed.input_range, "those that evaluate gives")
    return Spared(
        quantized=replace(whole, notes=(*whole.notes, odd)) if odd else whole,
        float_layers=tuple(chosen),
        ranking=ranking,
        value=real(chosen) if made else before,
        before=before,
        tried=len(rehearsed.values) + len(real.values),
        extra_bytes=sum(_extra_bytes(base, layers[n]) for n in chosen),
    )


class _Metric:
    """The metric with some layers in float, evaluated once for each choice of them."""

    def __init__(
        self,
        evaluate: Callable[[Callable[..., Any]], float],
        predict: Callable[[frozenset[str]], Callable[..., Any]],
    ) -> None:
        self._evaluate, self._predict = evaluate, predict
        self.values: dict[frozenset[str], float] = {}
        self.input_range = range_of(())

    def __call__(self, chosen: Sequence[str]) -> float:
        """Raises UsageError where the metric is no number."""
        key = frozenset(chosen)
        if key not in self.values:
            watched = Watched(self._predict(key))
            with torch.no_grad():
                self.values[key] = _number(self._evaluate(watched))
            self.input_range = watched.range
        return self.values[key]


def _number(value: Any) -> float:
    """What the metric gave. Raises UsageError where that is no number."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    msg = f"evaluate must return a number. Got {type(value).__name__}. Return the metric of predict as a float."
    raise UsageError(msg)


def _order(ranking: Sequence[Culprit]) -> list[str]:
    """Layers as they are to be tried: those of what harms, the most harmful first, then the others."""
    order = list(dict.fromkeys(n for c in ranking if c.share > 0 for n in c.layers))
    return order + [n for c in ranking for n in c.layers if n not in order and len(c.layers) == 1]


def _chosen(
    order: Sequence[str],
    rehearsed: _Metric,
    real: _Metric,
    meets: Callable[[float], bool],
) -> list[str] | None:
    """The fewest layers of `order` by rehearsal, if the network quantized so holds; else the shortest part of it that does, or None."""
    count = _smallest_prefix(order, lambda part: meets(rehearsed(part)))
    if count is not None:
        chosen = _without_idle(order[:count], lambda part: meets(rehearsed(part)))
        if meets(real(chosen)):
            return chosen
    # The rehearsal is not the network: what only it says must neither refuse a bound nor pass for one that is kept.
    if not meets(real(order)):
        return None
    count = _smallest_prefix(order, lambda part: meets(real(part)))
    return list(order[:count])


def _smallest_prefix(order: Sequence[str], holds: Callable[[Sequence[str]], bool]) -> int | None:
    """How many of the first must be taken, by doubling and bisection; None where all are not enough."""
    high = 1
    while not holds(order[:high]):
        if high >= len(order):
            return None
        high = min(2 * high, len(order))
    low = high // 2  # fails, or is nothing
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(order[:middle]) else (middle, high)
    return high


def _without_idle(chosen: Sequence[str], holds: Callable[[Sequence[str]], bool]) -> list[str]:
    kept = list(chosen)
    for layer in reversed(chosen):
        rest = [x for x in kept if x != layer]
        if holds(rest):
            kept = rest
    return kept


class Mixed:
    """`predict` of the calibrated network as it would be quantized, some layers in float; all of it in float without changes."""

    def __init__(self, base: Calibrated, float_layers: frozenset[str], changes: Changes | None) -> None:
        self._prepared, self._changes = base.prepared, changes
        self._spec = base.program.eval_graph.call_spec.out_spec
        self._skipped = skipped(base, float_layers)
        names = named_layers(base)
        back = [names[n] for n in (names if changes is None else float_layers) if n in names]
        held = {n for layer in back for n in (layer.weight, layer.bias)}
        self._floats = {n: t for n, t in base.floats.items() if n in held}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own structure; CPU float32 tensors."""
        flat = pytree.tree_leaves(pytree.tree_map(cloned, (args, kwargs)))
        run = Lane(self._prepared, flat, self._changes, self._skipped, floats=self._floats)
        with torch.no_grad():
            for node in self._prepared.graph.nodes:
                if node.op == "output":
                    break
                run.next(node, keep=any(u.op == "output" for u in node.users))
        found = pytree.tree_map(lambda v: run.env[v] if isinstance(v, fx.Node) else v, node.args[0])
        return pytree.tree_unflatten(pytree.tree_leaves(found), self._spec)


def skipped(base: Calibrated, float_layers: frozenset[str]) -> frozenset[str]:
    """The observers that are gone when these layers are in float: of their weights, and of values that only they make and read."""
    gone = {x.observer for name, x in named_layers(base).items() if name in float_layers}
    for observer, (makers, readers) in _values(base).items():
        if makers | readers and makers | readers <= float_layers:
            gone.add(observer)
    return frozenset(gone)


def named_layers(base: Calibrated) -> dict[str, Layer]:
    """Layers by the name of their weight in the user's model."""
    return {base.parameter_of(x.use.weight): x for x in layers_of(base.prepared)}


OTHER = "\0"
"""Stands for a maker or reader that works on codes and is no layer, as an addition."""


def _values(base: Calibrated) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Observers of activations, each with the layers that make the value and those that read it; either may be none."""
    names = {x.node: n for n, x in named_layers(base).items()}
    passing = {*named(base.target).fusions, *(op for op, kind in named(base.target).ops.items() if kind == "shared")}
    found: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
    for node in base.prepared.graph.nodes:
        observer: Any = fetch(base.prepared, str(node.target)) if node.op == "call_module" else None
        if observer is None or observes_weight(observer) or not hasattr(observer, "calculate_qparams"):
            continue
        makers = _ends([node.args[0]], lambda n: n.all_input_nodes[:1], names, passing)
        readers = _ends(list(node.users), lambda n: list(n.users), names, passing)
        old = found.get(str(node.target), (frozenset[str](), frozenset[str]()))
        found[str(node.target)] = (old[0] | makers, old[1] | readers)
    return found


def _ends(
    start: list[fx.Node], step: Callable[[fx.Node], list[fx.Node]], names: dict[fx.Node, str], passing: set[str]
) -> frozenset[str]:
    """The layers that a value comes from or goes to, through observers and ops that a runtime fuses or that only move values.

    Inputs, outputs and ops that stay in float want no codes: they are no ends.
    """
    ends: set[str] = set()
    waiting, seen = list(start), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in names:
            ends.add(names[node])
        elif node.op == "call_module" or op_name(node) in passing:
            waiting += step(node)
        elif "quantization_annotation" in node.meta:
            ends.add(OTHER)
    return frozenset(ends)


def rank(base: Calibrated, calibrate: Batches) -> tuple[Culprit, ...]:
    """What may be put in float, by what it does to the output, the most harmful first.

    That is every layer alone (its weight), and the layers around every value that only layers make and read.
    """
    calls = some(calibrate)
    shared = Changes()

    def outputs(predict: Callable[..., Any]) -> list[Tensor]:
        return [
            t.double() for args, kwargs in calls for t in tensors_of(predict(*args, **kwargs)) if t.is_floating_point()
        ]

    wanted = outputs(Mixed(base, frozenset(), None))
    scale = [max(float(t.square().mean()), 1e-30) for t in wanted]

    def error(float_layers: frozenset[str]) -> float:
        got = outputs(Mixed(base, float_layers, shared))
        return sum(float((a - b).square().mean()) / s for a, b, s in zip(got, wanted, scale, strict=True))

    layers = named_layers(base)
    whole = max(error(frozenset()), 1e-30)
    groups = {frozenset({n}): None for n in layers}
    groups |= {m | r: None for m, r in _values(base).values() if m | r and OTHER not in m | r}
    found = [
        Culprit(
            layers=tuple(sorted(group)),
            share=(whole - error(group)) / whole,
            extra_bytes=sum(_extra_bytes(base, layers[n]) for n in group),
        )
        for group in groups
    ]
    return tuple(sorted(found, key=lambda c: (-c.share, len(c.layers))))


def _extra_bytes(base: Calibrated, layer: Layer) -> int:
    bits, _ = base.formats(base.prepared)[base.parameter_of(layer.use.weight)]
    return fetch(base.prepared, layer.weight).numel() * (32 - bits) // 8


def some(calibrate: Batches) -> list[Inputs]:
    """The first `SAMPLES` samples. Raises RejectedError where there are none any more."""
    found: list[Inputs] = []
    left = SAMPLES
    for batch in each(calibrate):
        part: Any = rows(batch, slice(0, left))
        found.append(part)
        left -= max(1, len(next(iter(tensors_of(part)))))
        if left <= 0:
            break
    if not found:
        msg = "calibrate must give its samples each time it is called. Got none after the first time. Return a fresh iterable."
        raise RejectedError(msg)
    return found
