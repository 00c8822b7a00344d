"""reconstruct: the weights that are left are fitted anew, layer by layer, to what the dense model computes.

Least squares on calibration batches, no gradient and no training step: He, Zhang & Sun 2017 ("Channel pruning for
accelerating very deep neural networks"), eq. 1 for the fit and section 3.3 for residual branches.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paredown.couple.operand import args_of
from paredown.couple.trace import op_name, trace
from paredown.errors import NothingToDo, RejectedError, UsageError, must_be
from paredown.program import GraphModel, Program, placeholder_names
from paredown.prune.graph import conv_groups, rewritten_nodes
from paredown.prune.least_squares import Normal, Solution
from paredown.prune.module import tensors
from paredown.prune.nouns import Fit, Pruned
from paredown.prune.removal import Removal, removal, slice_state
from paredown.statistics.batches import Given, as_call, once, taken
from paredown.train.task import Step, kept_randomness, seed_all

Layers = Literal["readers", "all"]
_CONVS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_CHUNK_BYTES = 64 * 2**20
"""Of the float64 matrix view of a layer's input that is held at a time."""


def reconstruct(
    pruned: Pruned,
    batches: Given,
    *,
    step: Step | None = None,
    layers: Layers = "all",
    ridge: float = 1e-3,
    num_batches: int = 16,
    seed: int = 0,
) -> Pruned:
    """`pruned` with the weights of its linear and convolution layers fitted to the dense model's activations.

    In graph order, each on the layers before it as they are now:

        W' = argmin Σ ‖t - W' x - b'‖² + λ ‖W' - W‖²,   λ = `ridge` × mean of the Gram matrix's diagonal

    x [K] is an input of the pruned layer (patches of a convolution, per group), W its present weight [out, K], and t
    [out] what makes the network go on as the dense one does: the dense layer's output; behind a batch norm, the output
    that gives the dense batch norm's; and where that is then added to a shortcut, minus what the shortcut has lost
    already. b' goes into the bias, or into the batch norm's running mean; where there is neither it is 0. Sums are
    streamed in float64. The fit of a layer is never worse on the batches than what was there; `Pruned.fits` tells both.

    layers "readers" fits the layers that read removed channels, "all" also those that read what earlier removals have
    changed. Weights that are frozen, used more than once, or part of transposed convolutions stay; masked weights are
    fitted on their support. `batches()` yields training batches *as they are trained on*, as for
    reestimate_batch_norm: through `step(model, batch)`, or inputs alone. Live activations of all `num_batches` batches,
    of both networks, are kept in memory. `pruned` is not touched. Re-estimate batch norm afterwards (recover does).

    Raises UsageError (options, a plan that cannot be laid over the program), RejectedError (no batches, activations
    that are not finite) and NothingToDo (no layer can be fitted).

    >>> from paredown.plan import Plan; from paredown.program import capture; from paredown.prune import prune
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(True)
    >>> with torch.no_grad():
    ...     _ = net[0].weight[2].copy_(net[0].weight[0] + net[0].weight[1])
    ...     _ = net[0].bias.zero_()
    >>> x = torch.randn(64, 4)
    >>> small = prune(capture(net, x), Plan(keep={"0.weight": {0: (0, 1)}, "0.bias": {0: (0, 1)}, "1.weight": {1: (0, 1)}}))
    >>> fitted = reconstruct(small, lambda: [x], ridge=0.0)
    >>> bool(torch.allclose(fitted.module(x), net(x), atol=1e-5))
    True
    """
    must_be("pruned", pruned, Pruned, fix="Use paredown.prune(program, plan).")
    if step is not None:
        must_be("step", step, Callable)  # type: ignore[arg-type]
    _check(layers, ridge, num_batches)
    gone = _removal(pruned)
    with kept_randomness(), torch.no_grad():
        seed_all(seed)
        module, state = _own_copy(pruned, gone)
        sites = _sites(pruned, gone, state, layers)
        if not sites:
            msg = f"reconstruct must find a layer to fit. Got none with layers={layers!r}: no linear or convolution layer that may change reads what changed."
            raise NothingToDo(msg)
        pairs = _pairs(pruned.program, gone, state, taken(once(batches), num_batches), step)
        if not pairs:
            msg = (
                "batches must yield at least one batch to fit on. Got none. A generator must be made anew at each call."
            )
            raise RejectedError(msg)
        _refuse_other(module, pairs[0])
        fits = _walk(pairs, sites, state, ridge)
    return dataclasses.replace(pruned, module=module.eval(), fits=fits)


def _check(layers: str, ridge: float, num_batches: int) -> None:
    rules = [
        ("layers", layers in ("readers", "all"), '"readers" or "all"', layers),
        ("ridge", math.isfinite(ridge) and ridge >= 0, "a finite number ≥ 0", ridge),
        ("num_batches", isinstance(num_batches, int) and num_batches >= 1, "an integer ≥ 1", num_batches),
    ]
    for name, holds, rule, value in rules:
        if not holds:
            msg = f"{name} must be {rule}. Got {value!r}."
            raise UsageError(msg)


def _removal(pruned: Pruned) -> Removal:
    try:
        return removal(trace(pruned.program), pruned.plan)
    except UsageError as error:
        msg = (
            f"reconstruct must be able to lay the whole plan over the dense program. Got: {error} "
            "Reconstruct each level before the next one is pruned."
        )
        raise UsageError(msg) from error


def _own_copy(pruned: Pruned, gone: Removal) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the module, and the state of the pruned graph with that copy's tensors in it."""
    module = copy.deepcopy(pruned.module).eval()
    state = slice_state(pruned.program.state, gone.trace.storage, gone.keep)
    mine = tensors(module)
    if pruned.plan.drop_modules or pruned.plan.ranks:
        msg = "reconstruct must come before modules are dropped or factorized. Got a plan with both or one of them."
        raise UsageError(msg)
    different = [n for n in state if n in mine and mine[n].shape != state[n].shape]
    if different:
        msg = f"the module must have the shapes of its plan. Got {tuple(mine[different[0]].shape)} for {different[0]}, planned {tuple(state[different[0]].shape)}."
        raise RejectedError(msg)
    state.update({n: mine[n].detach() for n in state if n in mine})
    return module, state


# -------------------------------------------------------------------------------------------------------------- sites


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """A layer that may be fitted: where it is, and what follows it."""

    node: str
    weight: str
    bias: str | None
    groups: int
    spatial: int
    """0 for a linear layer, else the number of spatial axes of a convolution."""
    window: tuple[tuple[int, ...], ...]
    """Kernel, stride, (padding before, padding after) per axis, dilation."""
    free_bias: bool
    axis: int
    """Of the output's channels."""
    alive: Tensor
    """Which of the dense layer's outputs survive. Shape [dense outputs]."""
    support: Tensor | None
    norm: str | None
    """The batch norm that alone reads this layer."""
    moves: str | None
    """Name of that batch norm's running mean where b' may go there."""
    other: str | None
    """The other operand of the addition that alone reads it then."""


def _sites(pruned: Pruned, gone: Removal, state: Mapping[str, Tensor], layers: Layers) -> dict[str, _Site]:
    graph = pruned.program.eval_graph
    names = placeholder_names(graph)
    uses = _uses(graph.graph_module.graph.nodes, names, gone)
    mine = tensors(pruned.module)
    found = {}
    for node in graph.graph_module.graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name != "linear" and name not in _CONVS:
            continue
        weight, bias = (names.get(getattr(a, "name", "")) for a in args_of(node, "weight", "bias"))
        if weight is None or weight not in mine or not mine[weight].requires_grad:
            continue
        storage = _stored(gone, weight)
        if uses.get(storage) != 1:
            continue
        if layers == "readers" and 1 not in gone.keep.get(storage, {}):
            continue
        if args_of(node, "bias")[0] is not None and bias is None:
            continue  # a computed bias
        site = _site(node, weight, bias, pruned, gone, state[weight], uses)
        if site is not None:
            found[node.name] = site
    return found


def _uses(nodes: Iterable[fx.Node], names: Mapping[str, str], gone: Removal) -> dict[str, int]:
    """How many nodes read each stored tensor."""
    uses: dict[str, int] = {}
    for node in nodes:
        if node.op == "placeholder" and node.name in names:
            storage = _stored(gone, names[node.name])
            uses[storage] = uses.get(storage, 0) + len(node.users)
    return uses


def _site(
    node: fx.Node,
    weight: str,
    bias: str | None,
    pruned: Pruned,
    gone: Removal,
    tensor: Tensor,
    uses: Mapping[str, int],
) -> _Site | None:
    ids = gone.trace.of(node)
    spatial = _CONVS.get(op_name(node), 0)
    if spatial and ids.dim() != spatial + 2:
        return None  # a convolution without a batch axis
    axis = 1 if spatial else ids.dim() - 1
    names = placeholder_names(pruned.program.eval_graph)
    norm, other = _followers(node)
    moves = None
    if norm is not None:
        running = names.get(getattr(args_of(norm, "running_mean")[0], "name", ""))
        moves = running if running is not None and uses.get(_stored(gone, running)) == 1 else None
    mask = pruned.plan.masks.get(weight)
    groups = int(args_of(node, "groups")[0]) if spatial else 1
    alive = gone.survivors(ids, axis)
    return _Site(
        node=node.name,
        weight=weight,
        bias=bias,
        free_bias=bias is not None
        and tensors(pruned.module)[bias].requires_grad
        and uses.get(_stored(gone, bias)) == 1,
        groups=groups if groups == 1 else conv_groups(node, gone) or groups,
        spatial=spatial,
        window=_window(node, tuple(tensor.shape[2:])) if spatial else (),
        axis=axis,
        alive=alive,
        support=None if mask is None else torch.from_numpy(mask.kept.reshape(tensor.shape[0], -1)),
        norm=None if norm is None else norm.name,
        moves=moves,
        other=None if other is None else other.name,
    )


def _stored(gone: Removal, name: str) -> str:
    return gone.trace.storage.get(name, name)


def _followers(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(batch norm, other operand of the addition) behind a layer, where each alone reads the one before."""
    norm, here = None, _only_reader(node)
    if here is not None and op_name(here) == "batch_norm" and here.args[0] is node:
        if not all(isinstance(a, fx.Node) for a in args_of(here, "running_mean", "running_var")):
            return None, None  # it normalises each batch by itself
        norm, here = here, _only_reader(here)
    last = norm or node
    if here is None or op_name(here) not in ("add", "add_") or here.kwargs.get("alpha", 1) != 1 or len(here.args) != 2:
        return norm, None
    other = here.args[1] if here.args[0] is last else here.args[0]
    return norm, other if isinstance(other, fx.Node) and other is not last else None


def _only_reader(node: fx.Node) -> fx.Node | None:
    reader = next(iter(node.users), None)
    return reader if len(node.users) == 1 and reader is not None and reader.op == "call_function" else None


def _window(node: fx.Node, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """(kernel, stride, padding before, padding after, dilation) per spatial axis."""
    stride, padding, dilation = args_of(node, "stride", "padding", "dilation")
    count = len(kernel)
    strides, dilations = _per_axis(stride, count), _per_axis(dilation, count)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilations, strict=True)]
        edges = [(total // 2, total - total // 2) for total in totals]
    else:
        edges = [(p, p) for p in _per_axis(padding, count)]
    return tuple(
        (k, s, before, after, d) for k, s, (before, after), d in zip(kernel, strides, edges, dilations, strict=True)
    )


def _per_axis(value: Any, count: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * count if len(values) == 1 else values


# ----------------------------------------------------------------------------------------------- both networks at once


class _Run(fx.Interpreter):
    """A graph run node by node on one batch; values are dropped after their last use."""

    def __init__(self, body: fx.GraphModule, flat: list[Any]) -> None:
        super().__init__(body)
        self.args_iter = iter(flat)

    def next(self, node: fx.Node) -> None:
        """Run one node."""
        self.env[node] = self.run_node(node)
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """The dense and the pruned network on one batch, in step."""

    call: _Call
    flat: list[Any]
    """All placeholders of the pruned graph."""
    dense: _Run
    small: _Run
    at: Mapping[str, tuple[fx.Node, fx.Node]]
    """Name in the dense graph → that node in the dense and in the pruned graph."""

    def values(self, name: str) -> tuple[Tensor, Tensor] | None:
        """What a node gave in both networks, None where it was not computed yet."""
        dense, small = self.at[name]
        if dense not in self.dense.env or small not in self.small.env:
            return None
        return self.dense.env[dense], self.small.env[small]


def _pairs(
    program: Program, gone: Removal, state: Mapping[str, Tensor], batches: Iterable[Any], step: Step | None
) -> list[_Pair]:
    graph = program.eval_graph
    small, copies = rewritten_nodes(graph.graph_module, gone)
    bodies = graph.graph_module, small
    at = {node.name: (node, copied) for node, copied in copies.items()}
    names = placeholder_names(graph)
    holders = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    pairs = []
    for call in _calls(program, batches, step):
        flats = []
        for held in (program.state, state):
            given = iter(pytree.tree_leaves(pytree.tree_map(_cloned, call)))
            flats.append([held[names[n]] if n in names else next(given) for n in holders])
        runs = [_Run(body, flat) for body, flat in zip(bodies, flats, strict=True)]
        pairs.append(_Pair(call=call, flat=flats[1], dense=runs[0], small=runs[1], at=at))
    return pairs


def _calls(program: Program, batches: Iterable[Any], step: Step | None) -> Iterator[_Call]:
    """The inputs of every call that the user's step makes of the model, keywords in the captured order."""
    stand_in = GraphModel(program.eval_graph, None, {n: t.detach().clone() for n, t in program.state.items()}).eval()
    order = program.eval_graph.call_spec.in_spec.child(1).context or []
    seen: list[_Call] = []
    stand_in.register_forward_pre_hook(lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    for number, batch in enumerate(batches):
        if step is None:
            seen.append(as_call(program, batch, number))
        else:
            step(stand_in, batch)
        yield from (
            (args, {n: kwargs[n] for n in order} if set(order) == set(kwargs) else kwargs) for args, kwargs in seen
        )
        seen.clear()


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _refuse_other(module: nn.Module, pair: _Pair) -> None:
    """The module must compute what the graph of its plan does, or the fit would be that of another network."""
    args, kwargs = pytree.tree_map(_cloned, pair.call)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shown = pytree.tree_leaves(module(*args, **kwargs))
        torch.manual_seed(0)
        wanted = pair.small.module(*[_cloned(v) for v in pair.flat])
    for one, other in zip(shown, wanted, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            apart = float((one - other).abs().max()) if one.shape == other.shape else math.inf
            if not apart <= _SAME_NETWORK * float(other.abs().max()):
                msg = f"the module must compute what its plan's graph does, with finite outputs. Got a difference of {apart:.3g}. Was it changed by hand?"
                raise RejectedError(msg)


def _walk(pairs: list[_Pair], sites: Mapping[str, _Site], state: Mapping[str, Tensor], ridge: float) -> dict[str, Fit]:
    """Both networks from their inputs to their outputs; at each site the fit, before the pruned network goes on."""
    fits: dict[str, Fit] = {}
    dense_of = {copied: node for node, copied in pairs[0].at.values()}
    for node in pairs[0].small.graph.nodes:
        dense = dense_of.get(node)  # a size that was scaled has more nodes than before
        if dense is not None:
            for pair in pairs:
                pair.dense.next(dense)
            site = sites.get(dense.name)
            fit = _fit(pairs, site, state, ridge) if site is not None else None
            if site is not None and fit is not None:
                fits[site.weight] = fit
        if node.op != "output":
            for pair in pairs:
                pair.small.next(node)
    return fits


_SAME_NETWORK = 1e-3
_SAME = 1e-6
"""A layer that gives the target up to this share of its largest value is left as it is."""


def _fit(pairs: list[_Pair], site: _Site, state: Mapping[str, Tensor], ridge: float) -> Fit | None:
    """Fit one layer in place; None where it already gives what is wanted."""
    if all(_gives(pair, site) for pair in pairs):
        return None
    weight, groups = state[site.weight], site.groups
    rows = weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)
    bias = torch.zeros(weight.shape[0], dtype=torch.float64)
    if site.bias is not None:
        bias += state[site.bias].detach().double()
    sums = [Normal(rows.shape[2]) for _ in range(groups)]
    for pair in pairs:
        target = _target(pair, site)
        for part, x in _views(pair.small.env[_input(pair, site)], site, groups):
            _add(sums, x, target[part].movedim(site.axis, -1))
    intercept = site.free_bias or site.moves is not None
    support = None if site.support is None else site.support.reshape(rows.shape)
    solutions = [
        normal.solve(
            rows[g],
            bias.reshape(groups, -1)[g],
            intercept=intercept,
            ridge=ridge,
            support=None if support is None else support[g],
        )
        for g, normal in enumerate(sums)
    ]
    _refuse_unusable(solutions, site)
    weight.copy_(torch.stack([s.weight for s in solutions]).reshape(weight.shape))
    moved = torch.cat([s.bias for s in solutions])
    if site.free_bias and site.bias is not None:
        state[site.bias].copy_(moved)
    elif site.moves is not None:
        state[site.moves].sub_(moved - bias)
    spread = sum(s.spread for s in solutions)
    scale = spread if spread > 0 else 1.0
    return Fit(before=sum(s.before for s in solutions) / scale, after=sum(s.after for s in solutions) / scale)


def _refuse_unusable(solutions: list[Solution], site: _Site) -> None:
    if not all(bool(torch.isfinite(s.weight).all()) and bool(torch.isfinite(s.bias).all()) for s in solutions):
        msg = (
            f"activations must be finite to fit on. Got NaN or infinity at {site.weight}. Look for NaN in the batches."
        )
        raise RejectedError(msg)


def _input(pair: _Pair, site: _Site) -> fx.Node:
    node = pair.at[site.node][1]
    return cast(fx.Node, args_of(node, "input")[0])


def _gives(pair: _Pair, site: _Site) -> bool:
    node = pair.at[site.node][1]
    now, wanted = pair.small.run_node(node), _target(pair, site)
    return float((now - wanted).abs().max()) <= _SAME * float(wanted.abs().max())


def _target(pair: _Pair, site: _Site) -> Tensor:
    """What the layer should give. Shape of the pruned layer's output."""
    dense = pair.at[site.node][0]
    target: Tensor = pair.dense.env[dense].index_select(site.axis, site.alive.nonzero()[:, 0])
    scale_d = scale_s = torch.ones(target.shape[site.axis], dtype=target.dtype)
    shift_d = shift_s = torch.zeros_like(scale_d)
    if site.norm is not None:
        norm_d, norm_s = pair.at[site.norm]
        scale_d, shift_d = (v[site.alive] for v in _affine(pair.dense, norm_d))
        scale_s, shift_s = _affine(pair.small, norm_s)
    lost = _lost(pair, site, target)
    if site.norm is None:
        return target if lost is None else target + lost
    view = [1] * target.dim()
    view[site.axis] = -1
    usable = scale_s.abs() > _SAME * scale_s.abs().max()  # a channel that its norm switches off is fitted as it is
    scale_s = torch.where(usable, scale_s, torch.ones_like(scale_s))
    seen = target * scale_d.reshape(view) + (shift_d - shift_s).reshape(view)
    if lost is not None:
        seen = seen + lost
    return torch.where(usable.reshape(view), seen / scale_s.reshape(view), target)


def _affine(run: _Run, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode."""
    weight, bias, mean, var, eps = (
        run.env[a] if isinstance(a, fx.Node) else a
        for a in args_of(norm, "weight", "bias", "running_mean", "running_var", "eps")
    )
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _lost(pair: _Pair, site: _Site, target: Tensor) -> Tensor | None:
    """What the other operand of the addition lacks of its dense value, where both are there already."""
    both = pair.values(site.other) if site.other is not None else None
    if both is None or not all(isinstance(v, Tensor) for v in both):
        return None
    dense, small = both
    if dense.dim() != target.dim() or small.shape != target.shape:
        return None
    if dense.shape[site.axis] == len(site.alive):
        dense = dense.index_select(site.axis, site.alive.nonzero()[:, 0])
    return dense - small if dense.shape == small.shape else None


def _views(x: Tensor, site: _Site, groups: int) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the batch, each with its inputs [samples, positions…, groups, K]."""
    if not site.spatial:
        yield slice(None), x[..., None, :]
        return
    pads = [p for _, _, before, after, _ in reversed(site.window) for p in (before, after)]
    kernel = math.prod(k for k, *_ in site.window)
    positions = math.prod(x.shape[2:]) // math.prod(s for _, s, *_ in site.window) + 1
    size = max(1, _CHUNK_BYTES // (8 * x.shape[1] * kernel * positions))
    for start in range(0, len(x), size):
        part = nn.functional.pad(x[start : start + size], pads)
        for axis, (k, stride, _, _, dilation) in enumerate(site.window):
            part = part.unfold(2 + axis, dilation * (k - 1) + 1, stride)[..., ::dilation]
        part = part.movedim(1, 1 + site.spatial)  # [samples, *positions, channels, *kernel]
        split = part.reshape(*part.shape[: 1 + site.spatial], groups, -1)
        yield slice(start, start + size), split


def _add(sums: list[Normal], x: Tensor, target: Tensor) -> None:
    """x [samples, positions…, groups, K], target [samples, positions…, out]."""
    target = target.reshape(*target.shape[:-1], len(sums), -1)
    for group, normal in enumerate(sums):
        normal.add(x[..., group, :].reshape(-1, x.shape[-1]), target[..., group, :].reshape(-1, target.shape[-1]))
