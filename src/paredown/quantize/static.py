"""Static post-training quantization through torchao's PT2E, annotated from the target's table."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paredown.errors import MissingError, NothingToDo, RejectedError, UsageError, VerificationError
from paredown.program import Inputs, Program, capture, quiet, source_line
from paredown.prune.nouns import Pruned
from paredown.quantize.bags import has_bags, plain_bags
from paredown.quantize.batches import Batches, tensors_of
from paredown.quantize.calibration import run_samples
from paredown.quantize.computed import hold_computed, scales_into_layers
from paredown.quantize.copied import eval_copy, is_current
from paredown.quantize.decompose import decompose, fetch, free_batch_norms, op_name
from paredown.quantize.nouns import Packed, Quantized
from paredown.quantize.numerics import ODD, bias_floor, fake_quantize
from paredown.quantize.products import FROM, OF, products_as_layers
from paredown.quantize.pt2e import pt2e
from paredown.quantize.schemes import DYNAMIC, HALF, SCHEMES, WEIGHTS, Levels, is_narrow, scheme_named
from paredown.quantize.whole_biases import whole_biases
from paredown.score.patterns import matches
from paredown.target import TARGETS, Target, named

if TYPE_CHECKING:
    from paredown.quantize.annotate import TableQuantizer

STATIC = (*(s.name for s in SCHEMES.values() if s.activations == "static"), *WEIGHTS)
REPAIRS = ("equalize", "smooth", "gptq", "adaround", "blocks", "bias", "bias-fast")
"""What may be done against the rounding, in this order: the first two before calibration, the others after it."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The parameter that an op reads, and whether it reads the transpose of it, or what is computed from it (computed.py)."""

    parameter: str
    transposed: bool = False
    computed: bool = False


Owners = dict[tuple[str, int], Owner]
"""(name of a node, which of its inputs) → the parameter that this input is."""


def quantize(
    tuned: Pruned | Program,
    *,
    target: str = "onnxruntime-x86",
    calibrate: Batches | None = None,
    scheme: str = "int8",
    observer: str = "mse",
    num_samples: int | None = None,
    repair: Sequence[str] = (),
    weights: Literal["channel", "tensor"] = "channel",
    float_layers: Sequence[str] = (),
    bits: Mapping[str, int] | None = None,
    idle_repairs: bool = False,
) -> Quantized:
    """Static quantization for a runtime: integer weights per output channel, integer activations per tensor.

    q = clamp(round(x / s) + z, qmin, qmax). `scheme` is "int8" (8-bit weights and activations), "w4a8" or "w4a4".
    Weights: z = 0; eight bits have s = max|w| / 127 per channel and codes in [-127, 127], four bits the scale of least
    squared error and codes in [-8, 7]. For x86, s is larger where two neighbouring weights would add up to more than ±128: their products
    could saturate (see `Target.pair_sum`). Activations: the target's dtype (uint8 for ONNX Runtime on x86), range by
    `observer`: "minmax" (all values seen), "moving-average" (of the batches' ranges), "percentile" (99.99 % of the
    values; another one as "percentile=99.9"), "mse" (least squared error) or "entropy" (TensorRT's; results of sigmoid and
    softmax have "minmax" then), the last three from a streaming histogram. Batch norm is folded first. Works on a user's own
    module and on a GraphModel; the batch stays dynamic; neither `tuned` nor its weights change.

    A repair that finds nothing to do is refused; with `idle_repairs` it is noted, as in runs, whose searches may take away what it works on.

    "w2", "ternary" and "binary" code weights alone: activations, and all that is computed, stay float32. Their codes are ±1 and
    ±3 (`balanced`, see schemes.weight_range), -1, 0, 1 and ±1, with scales of least squared error per output channel; the
    first and the last layer have eight bits. Without `repair` they need no samples.

    `bits` gives layers a number of bits of their own, 1 to 8, by patterns (fnmatch) of parameters or modules, the first that
    matches; 2 are balanced, 1 is binary. See `paredown.quantize.mixed.allot` for how to choose them.

    "int8-dynamic" and "w4" need no samples and leave no range to choose: see quantize.dynamic. "fp16" rounds weights to 16 bits: see quantize.half.

    `calibrate` holds inputs (no labels): an iterable, or a function that returns one, of tensors, tuples of arguments
    or {"args": …, "kwargs": …}; at most `num_samples` of them are read. Samples with NaN or infinity are left out.
    `repair` names what is done against the rounding, in whatever order they are given: "equalize" and "smooth" move
    ranges between layers without changing the function, "gptq" or "adaround" choose codes layer after layer by what they
    do to its output, "blocks" goes on from gptq's codes and chooses those of a whole residual block together, "bias" or "bias-fast"
    give back the means ("bias" also after gptq or adaround, which have read some of the positions). `notes` say how much each of them did. They keep the
    samples and their activations in memory. A weight that the model computes from its parameters alone (standardised, normalised,
    scaled) is evaluated once, and has codes under the name of the parameter that it comes from (computed.py).
    `weights` "tensor" has one scale per weight. `float_layers` are patterns (fnmatch) of parameters or modules that
    stay in float.

    Raises UsageError (scheme, target, observer, repair), RejectedError (no samples, samples that do not fit, a network that
    is quantized already or not in float32), NothingToDo (no weight would be codes, or a repair finds nothing to do),
    MissingError (torchao), ResourceError (what repairs keep would not fit in memory, by an estimate), VerificationError (the prepared graph computes something else, or a repair does).

    >>> from paredown.program import capture
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> small = quantize(capture(net, torch.zeros(2, 1, 4, 4)), calibrate=[torch.rand(32, 1, 4, 4)])
    >>> sorted(small.weights), small.weights["0.weight"].codes.dtype
    (['0.weight', '3.weight'], torch.int8)
    """
    _refuse_other(scheme, (*STATIC, *DYNAMIC, HALF))
    if scheme in (*DYNAMIC, HALF):
        return _without_data(tuned, target, scheme, calibrate, repair, weights, float_layers, bits)
    if calibrate is None and (scheme not in WEIGHTS or repair):
        msg = f"quantize must be given calibrate=…, inputs like those the network will see, for the scheme {scheme_named(scheme).name}. Got none."
        raise UsageError(msg)
    base = calibrated(
        tuned, target=target, calibrate=calibrate, scheme=scheme, observer=observer, num_samples=num_samples,
        repair=repair, weights=weights, float_layers=float_layers, bits=bits, idle_repairs=idle_repairs,
    )  # fmt: skip
    return converted(base, base.prepared)


def _without_data(
    tuned: Any,
    target: str,
    scheme: str,
    calibrate: Batches | None,
    repair: Sequence[str],
    weights: str,
    float_layers: Sequence[str],
    bits: Mapping[str, int] | None,
) -> Quantized:
    """The schemes that need no samples (see quantize.dynamic and quantize.half)."""
    from paredown.quantize.dynamic import quantize_dynamic
    from paredown.quantize.half import quantize_half

    if repair or weights != "channel":
        msg = f"repair must be empty and weights 'channel' for the scheme {scheme}, which reads no samples. Got repair={list(repair)}, weights={weights!r}."
        raise UsageError(msg)
    if bits:
        msg = f"bits must be left out for the scheme {scheme}, whose kernels have one width. Got {dict(bits)}."
        raise UsageError(msg)
    refuse_target(scheme, named(target))
    if scheme == HALF:
        quantized = quantize_half(_recaptured(tuned), target=target, float_layers=float_layers)
    else:
        quantized = quantize_dynamic(
            _recaptured(tuned), target=target, scheme=scheme_named(scheme), float_layers=float_layers
        )
    unread = () if calibrate is None else (f"calibration: {scheme} reads no samples, those given were not used",)
    return replace(quantized, notes=(*quantized.notes, *unread))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A network with its ranges found and its repairs done: what conversion or quantization-aware training starts from."""

    prepared: fx.GraphModule
    """The float graph, batch norm folded, with an observer at every value that will be codes."""
    program: Program
    owners: Owners
    scheme: str
    target: str
    notes: tuple[str, ...]
    floats: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights and biases of the prepared graph before a repair chose their codes, by attribute; none without such a repair."""
    input_range: tuple[float, float] | None = None
    """Of the calibration inputs."""

    def formats(self, prepared: fx.GraphModule) -> dict[str, tuple[int, Levels]]:
        """Bits and levels of each weight that has an observer or a learned step, by its parameter."""
        found: dict[str, tuple[int, Levels]] = {}
        for node in prepared.graph.nodes:
            held: Any = fetch(prepared, str(node.target)) if node.op == "call_module" else None
            if hasattr(held, "ch_axis"):
                width = held.quant_max if held.levels in ODD else held.quant_max - held.quant_min
                # Integers without a most negative code are those of eight bits, whether all of them are used or not.
                eight = held.levels == "integer" and held.quant_min == -held.quant_max
                found[self.parameter_of(node)] = (8 if eight else int(width).bit_length(), held.levels)
        return found

    def owner_of(self, observer: fx.Node) -> Owner:
        """The parameter behind a weight's observer."""
        readers = ((u.name, u.all_input_nodes.index(observer)) for u in observer.users)
        return next((self.owners[r] for r in readers if r in self.owners), Owner(str(observer.args[0].target)))  # type: ignore[union-attr]

    def parameter_of(self, observer: fx.Node) -> str:
        """Its name in the user's model."""
        return self.owner_of(observer).parameter


def calibrated(
    tuned: Pruned | Program,
    *,
    target: str,
    calibrate: Batches | None,
    scheme: str = "int8",
    observer: str = "mse",
    num_samples: int | None = None,
    repair: Sequence[str] = (),
    weights: str = "channel",
    float_layers: Sequence[str] = (),
    bits: Mapping[str, int] | None = None,
    idle_repairs: bool = False,
) -> Calibrated:
    """The first half of `quantize`, with its options and errors: everything but the conversion to codes.

    With `idle_repairs` a repair that finds nothing to do is noted, not refused: a search may have taken away what it works on.
    """
    table = _checked(target, scheme, observer, num_samples, repair, weights, bits or {})
    program = _recaptured(tuned)
    graph = program.eval_graph.module(check_guards=False)
    with quiet("torchao"):
        from paredown.quantize.annotate import TableQuantizer
        from paredown.quantize.stayed import refuse_empty, told_of

        quantizer = TableQuantizer(table, observer, scheme_named(scheme), weights, float_layers, bits)
    prepared, owners = _prepared(graph, quantizer, program)
    refuse_empty(prepared, table, scheme, quantizer.float_layers)
    stayed = told_of(scheme, prepared, table)
    calls: list[Inputs] | None = [] if repair else None
    notes, inputs = (
        ((), None) if calibrate is None else run_samples(prepared, calibrate, num_samples, program, calls, repair)
    )
    floats: dict[str, Tensor] = {}
    repaired = tuple(_repaired(prepared, table, calls or [], repair, idle_repairs, floats))
    base = Calibrated(
        prepared=prepared,
        program=program,
        owners=owners,
        scheme=scheme,
        target=target,
        notes=(*program.notes, *notes, *repaired, *stayed),
        floats=floats,
        input_range=inputs,
    )
    _refuse_masks(tuned, base)
    from paredown.quantize.zeros import told

    masked = tuned.plan.masks if isinstance(tuned, Pruned) else {}
    return replace(base, notes=(*base.notes, *told(base, masked)))


def _refuse_masks(tuned: Pruned | Program, base: Calibrated) -> None:
    """Levels without 0 would fill what was pruned."""
    masks = tuned.plan.masks if isinstance(tuned, Pruned) else {}
    for name, (_, levels) in base.formats(base.prepared).items():
        if name in masks and levels in ODD:
            msg = f"a weight with a mask must have levels with a 0. Got {levels} codes for {name}. Take ternary, or three bits or more."
            raise UsageError(msg)


def converted(base: Calibrated, prepared: fx.GraphModule) -> Quantized:
    """The second half: codes in place of observers. `prepared`, the graph of `base` or what training made of it, is used up."""
    formats = base.formats(prepared)
    _settle(prepared)
    with pt2e():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        module = convert_pt2e(prepared)
        _slim(module)
    whole_biases(module, base.target)
    return Quantized(
        module=module,
        program=base.program,
        scheme=base.scheme,
        target=base.target,
        inputs=base.program.inputs,
        weights=dict(_packed(module, base.owners, formats)),
        notes=base.notes,
    )


def _settle(prepared: fx.GraphModule) -> None:
    """Put weights whose levels have no 0 on them: PT2E rounds to the nearest integer, and finds these then."""
    on_grid: dict[str, Tensor] = {}
    for node in prepared.graph.nodes:
        held: Any = fetch(prepared, str(node.target)) if node.op == "call_module" else None
        if getattr(held, "levels", "integer") in ODD:
            name, found = str(node.args[0].target), held.calculate_qparams()
            on_grid[name] = fake_quantize(fetch(prepared, name).detach(), held, found)
            held.fixed = found[0]
    for name, values in on_grid.items():
        fetch(prepared, name).data = values


def _repaired(
    prepared: fx.GraphModule,
    table: Target,
    calls: Sequence[Inputs],
    repair: Sequence[str],
    idle: bool,
    floats: dict[str, Tensor],
) -> Iterator[str]:
    """The repairs in their order, whatever order they were asked for in; what each of them did. `floats` receives what was rounded."""
    from paredown.quantize.bias import correct_biases
    from paredown.quantize.equalize import equalize, smooth
    from paredown.quantize.lanes import layers_of
    from paredown.quantize.rounding import METHODS, round_layers

    scalings = {n: f for n, f in (("equalize", equalize), ("smooth", smooth)) if n in repair}
    if scalings:
        before = _outputs(prepared, calls[0])
        for name, scale in scalings.items():
            found = scale(prepared, calls)
            rule = f"the repair {name} must leave the function as it is"
            _refuse_change(before, _outputs(prepared, calls[0]), rule, "Leave it out.")
            yield _told(name, len(found), idle, f", by up to {max(found.values(), default=1.0):.3g}")
        _reset(prepared)
        for args, kwargs in calls:  # ranges have moved
            with torch.no_grad():
                prepared(*args, **kwargs)
    _keep_biases(prepared, table)
    if any(
        r in repair for r in (*METHODS, "blocks", "bias", "bias-fast")
    ):  # which put other tensors in the place of these
        for layer in layers_of(prepared):
            floats |= {n: fetch(prepared, n).detach() for n in (layer.weight, layer.bias) if n is not None}
    for method in METHODS:
        if method in repair:
            yield _told(method, len(round_layers(prepared, calls, method=method)), idle)
    if "blocks" in repair:
        from paredown.quantize.blocks import reconstruct

        together = len(reconstruct(prepared, calls))
        yield _told("blocks", len(list(layers_of(prepared))), idle, f", {together} blocks together")
    for name in ("bias", "bias-fast"):
        if name in repair:
            yield _told(name, len(correct_biases(prepared, calls, full=name == "bias", floats=floats)), idle)


_REPAIRED = {
    "equalize": (
        "channels of {} layers scaled",
        "two layers with nothing but ReLU, leaky ReLU, pools or a ReLU6 that cuts nothing between them",
    ),
    "smooth": ("channels of {} norms scaled", "a layer norm with a weight and a bias that linear layers alone read"),
    **dict.fromkeys(
        ("gptq", "adaround", "blocks"), ("codes of {} layers chosen", "a quantized layer whose weight no other reads")
    ),
    **dict.fromkeys(("bias", "bias-fast"), ("{} biases moved", "a quantized layer with a bias of its own")),
}
"""By repair: what it did, and what it needs."""


def _told(name: str, count: int, idle: bool, more: str = "") -> str:
    did, need = _REPAIRED[name]
    if count:
        return f"repair {name}: {did.format(count)}{more}"
    if not idle:
        msg = f"the repair {name} must have {need}. Got none in this network, so it would change nothing. Leave it out."
        raise NothingToDo(msg)
    return f"repair {name}: nothing to do"


def _reset(prepared: fx.GraphModule) -> None:
    for module in prepared.modules():
        reset: Any = getattr(module, "reset", None)
        if reset is not None:
            reset()


def _checked(
    target: str,
    scheme: str,
    observer: str,
    num_samples: int | None,
    repair: Sequence[str],
    weights: str,
    bits: Mapping[str, int],
) -> Target:
    from paredown.recipe_fields import clash_of

    table = named(target)
    _refuse_other(scheme, STATIC)
    unknown = [r for r in repair if r not in REPAIRS]
    if isinstance(repair, str) or unknown:
        msg = (
            f"repair must be a list of {', '.join(REPAIRS)}. Got {repair if isinstance(repair, str) else unknown[0]!r}."
        )
        raise UsageError(msg)
    if clash := clash_of(repair):
        msg = f"repair {clash}"
        raise UsageError(msg)
    if weights not in ("channel", "tensor"):
        msg = f"weights must be 'channel' or 'tensor'. Got {weights!r}."
        raise UsageError(msg)
    whole = isinstance(num_samples, int) and not isinstance(num_samples, bool)
    if num_samples is not None and not (whole and num_samples >= 1):
        msg = f"num_samples must be an integer ≥ 1, or None for all. Got {num_samples!r}."
        raise UsageError(msg)
    for pattern, own in bits.items():
        if isinstance(own, bool) or not isinstance(own, int) or not 1 <= own <= 8:
            msg = f"bits must be integers from 1 to 8. Got {own!r} for {pattern!r}."
            raise UsageError(msg)
    refuse_target(scheme, table)
    require_torchao()
    from paredown.quantize.observe import observer_named

    observer_named(observer)
    return table


def refuse_target(scheme: str, table: Target) -> None:
    """Raises UsageError where the target has no file for the scheme: weights alone, and ranges at run time, are ONNX Runtime's."""
    if scheme == HALF:
        able = [t.name for t in TARGETS.values() if "float16" in t.dtypes]
    elif scheme in (*DYNAMIC, *WEIGHTS) or is_narrow(scheme):
        able = [name for name in TARGETS if name.startswith("onnxruntime")]
    else:
        return
    if table.name not in able:
        msg = f"target must be one of {', '.join(able)} for the scheme {scheme}. Got {table.name!r}. Take int8, or one of these."
        raise UsageError(msg)


def _refuse_other(scheme: str, offered: Sequence[str]) -> None:
    if scheme in offered:
        return
    hint = ""
    if scheme in (*DYNAMIC, HALF):
        hint = " It reads no samples and leaves nothing to choose: use paredown.quantize."
    elif scheme in SCHEMES:
        hint = " It is a scheme of paredown, but this version cannot produce it yet."
    msg = f"scheme must be one of {', '.join(offered)}. Got {scheme!r}.{hint}"
    raise UsageError(msg)


def require_torchao() -> None:
    """Raises MissingError where torchao cannot be imported."""
    try:
        with quiet("torchao"):
            importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    except ImportError as error:
        msg = "quantize must have torchao. It is not installed. Run: pip install 'paredown[quant]'."
        raise MissingError(msg) from error


def _recaptured(tuned: Any) -> Program:
    if isinstance(tuned, Quantized):
        msg = f"the network to quantize must be in float. Got a network that is {tuned.scheme} already. Pass what it was made from."
        raise RejectedError(msg)
    if not isinstance(tuned, Pruned | Program):
        msg = f"the network to quantize must be a Pruned or a Program. Got {type(tuned).__name__}. Use paredown.capture(model, inputs)."
        raise UsageError(msg)
    if isinstance(tuned, Program) and tuned.batch == "dynamic" and is_current(tuned):
        program = eval_copy(tuned)
    else:  # other weights since it was captured; or a batch that may be free all the same
        args, kwargs = tuned.program.inputs if isinstance(tuned, Pruned) else tuned.inputs
        program = capture(tuned.module, {"args": args, "kwargs": kwargs}, train=False)
    kinds = {t.dtype for t in program.state.values() if t.is_floating_point() and isinstance(t, nn.Parameter)}
    if kinds and torch.float32 not in kinds:
        names = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
        msg = f"the network to quantize must be in float32. Got parameters in {names}. Call model.float(), give it float32 inputs and capture it again."
        raise RejectedError(msg)
    coded = [n for n in program.eval_graph.graph.nodes if "quantize" in str(n.target)]
    if coded:
        where = source_line(coded[0]) or coded[0].name
        msg = f"the network to quantize must be in float. Got {len(coded)} quantize or dequantize ops, the first at {where}."
        raise RejectedError(msg)
    return program


def _prepared(graph: fx.GraphModule, quantizer: TableQuantizer, program: Program) -> tuple[fx.GraphModule, Owners]:
    """The graph with observers in it, which must still compute the same function, and whose parameter each op reads."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    before = _outputs(graph, program.inputs)
    with pt2e():
        if has_bags(graph.graph):
            plain_bags(graph)
        scales_into_layers(graph)
        hold_computed(graph)
        if quantizer.target.ops.get("linear") == "weighted":
            products_as_layers(graph)
        decompose(graph, quantizer.target.decompositions)
        free_batch_norms(graph)
        owners = {
            (node.name, i): Owner(str(x.meta.get(OF, x.meta.get(FROM, x.target))), OF in x.meta, FROM in x.meta)
            for node in graph.graph.nodes
            for i, x in enumerate(node.all_input_nodes)
            if x.op == "get_attr"
        }
        _refuse_unknown(graph, "float_layers", quantizer.float_layers)
        _refuse_unknown(graph, "bits", tuple(quantizer.bits))
        prepared = prepare_pt2e(graph, quantizer)
    after = _outputs(prepared, program.inputs)
    _reset(prepared)
    rule = "the graph prepared for quantization must compute the same function"
    hint = "An op that changes its input in place may be the cause: write it without the underscore."
    _refuse_change(before, after, rule, hint)
    return prepared, owners


def _outputs(graph: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    args, kwargs = _cloned(inputs)
    with torch.no_grad():
        return tensors_of(graph(*args, **kwargs))


def _refuse_change(before: Sequence[Tensor], after: Sequence[Tensor], rule: str, hint: str) -> None:
    for one, other in zip(before, after, strict=True):
        differ = ~(one.isinf() & (one == other))  # minus infinity is what a mask writes
        a, b = one[differ].double(), other[differ].double()
        scale = float(a.abs().max()) if a.numel() else 0.0
        error = float((a - b).abs().max()) if a.numel() else 0.0
        if not error <= 1e-3 * max(scale, 1e-6):
            msg = f"{rule}. Got a difference of {error:.3g} at scale {scale:.3g}. {hint}"
            raise VerificationError(msg)


def _refuse_unknown(graph: fx.GraphModule, option: str, patterns: Sequence[str]) -> None:
    from paredown.quantize.annotate import layer_names

    known = {n for node in graph.graph.nodes if node.op == "call_function" for n in layer_names(node)}
    for pattern in patterns:
        if not matches(known, [pattern]):
            near = difflib.get_close_matches(pattern, known, 3) or sorted(known)[:3]
            msg = f"{option} must match parameters or modules of the network. Got {pattern!r}, which matches none; there are {', '.join(near)}."
            raise UsageError(msg)


def _keep_biases(prepared: fx.GraphModule, table: Target) -> None:
    """Give every weight observer the smallest scale for which the bias fits into int32."""
    observers = dict(prepared.named_modules())
    for node in prepared.graph.nodes:
        if table.ops.get(op_name(node)) != "weighted" or len(node.args) < 3 or not _holder(node, 2):
            continue
        x: Any = observers.get(str(node.args[0].target))
        weight: Any = observers.get(str(node.args[1].target))
        if hasattr(x, "calculate_qparams") and hasattr(weight, "floor"):
            floor = bias_floor(fetch(prepared, str(node.args[2].target)), float(x.calculate_qparams()[0]))
            weight.floor = floor if weight.floor is None else torch.maximum(weight.floor, floor)


def _slim(converted: fx.GraphModule) -> None:
    """One dequantize per value, and none that is quantized again with the same parameters: same codes, half the graph."""
    ops = torch.ops.quantized_decomposed
    first: dict[Any, fx.Node] = {}
    for node in list(converted.graph.nodes):
        if node.target is ops.quantize_per_tensor.default:
            source = node.args[0]
            if source.target is ops.dequantize_per_tensor.default and source.args[1:] == node.args[1:]:
                node.replace_all_uses_with(source.args[0])
                converted.graph.erase_node(node)
        elif node.target in (ops.dequantize_per_tensor.default, ops.dequantize_per_channel.default):
            known = first.setdefault((node.target, *node.args, *sorted(node.kwargs.items())), node)
            if known is not node:
                node.replace_all_uses_with(known)
                converted.graph.erase_node(node)
    converted.graph.eliminate_dead_code()
    converted.recompile()


def _packed(
    converted: fx.GraphModule, owners: Owners, formats: Mapping[str, tuple[int, Levels]]
) -> Iterator[tuple[str, Packed]]:
    """The codes by the parameter's name; a constant that is computed from others by the name PT2E gave it."""
    ops = torch.ops.quantized_decomposed
    done: set[str] = set()
    for node in converted.graph.nodes:
        if node.target not in (ops.dequantize_per_channel.default, ops.dequantize_per_tensor.default) or not _holder(
            node, 0
        ):
            continue
        codes = fetch(converted, str(node.args[0].target))
        readers = ((u.name, u.all_input_nodes.index(node)) for u in node.users)
        owner = next((owners[r] for r in readers if r in owners), Owner(str(node.args[0].target)))
        name = owner.parameter
        own = formats.get(name, (8, "integer"))
        name = name if name not in done else f"{name} ({node.name})"
        done.add(name)
        per_channel = node.target is ops.dequantize_per_channel.default
        scales, zeros = (
            fetch(converted, str(a.target)) if isinstance(a, fx.Node) else torch.tensor(a) for a in node.args[1:3]
        )
        yield (
            name,
            Packed(
                codes=codes.t() if owner.transposed else codes,
                scales=scales.float(),
                zero_points=zeros.long(),
                bits=own[0] if per_channel else 8,
                levels=own[1] if per_channel else "integer",
                axis=abs(int(node.args[3]) - owner.transposed) if per_channel else None,
            ),
        )


def _holder(node: fx.Node, position: int) -> bool:
    arg = node.args[position] if len(node.args) > position else None
    return isinstance(arg, fx.Node) and arg.op == "get_attr"


def _cloned(values: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, values)
