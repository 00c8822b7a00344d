"""The proof of a removal: on random weights of healthy scale, pruned must equal dense with the removed reads zeroed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from paredown.couple import recurrent
from paredown.couple.operand import args_of, schema
from paredown.couple.trace import op_name
from paredown.errors import VerificationError
from paredown.program import Program, placeholder_names
from paredown.prune.example import healthy_inputs, own_example
from paredown.prune.nouns import Proof
from paredown.prune.one_dtype import one_dtype
from paredown.prune.removal import Removal, slice_state

SINGLE, DOUBLE = 1e-4, 1e-9
"""Largest error relative to the output's scale, in float32 and in float64."""
_DRAWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What every realiser is compared with: random weights, and the dense outputs with and without the removal."""

    state: Mapping[str, Tensor]
    """Random weights of healthy scale, reads of removed units zeroed, cut to what is kept."""
    inputs: Any
    dense: list[Any]
    masked: list[Any]
    dtype: torch.dtype
    program: Program


def reference(program: Program, removal: Removal, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Reference:
    """Run the dense graph on random weights, then again with every read of a removed unit zeroed.

    Weights are drawn anew where the output does not move, or does not hang on what stays: with less gain, because saturated
    activations hide a change, and again and again, because one channel behind a ReLU is dead in half of all draws.
    """
    inputs = pytree.tree_map(lambda t: in_dtype(t, dtype), healthy_inputs(program, seed))
    found: Reference | None = None
    for attempt in range(_DRAWS):
        drawn = healthy(program, seed + attempt, gain=1.0 / (1 + attempt % 3))
        state = {n: in_dtype(t, dtype) for n, t in drawn.items()}
        with torch.no_grad():
            dense = run_dense(program, state, inputs, None, dtype)
            _zero_reads(state, removal)
            masked = run_dense(program, state, inputs, removal, dtype)
            if not tells(dense, masked):
                continue
            without = _without_survivors(state, removal)
            hangs = without is None or _shows(masked, run_dense(program, without, inputs, removal, dtype))
        if found is None or hangs:
            cut = slice_state(state, removal.trace.storage, removal.keep)
            found = Reference(state=cut, inputs=inputs, dense=dense, masked=masked, dtype=dtype, program=program)
        if hangs:
            break
    if found is None:
        msg = (
            f"the output must be finite and must move when channels leave, or a proof would be empty. Got scale "
            f"{scale_of(dense):.2e} and a move of {distance(masked, dense):.2e} on random weights. Exclude these channels."
        )
        raise VerificationError(msg)
    return found


def _without_survivors(state: Mapping[str, Tensor], removal: Removal) -> dict[str, Tensor] | None:
    """The state with every read of the spaces that lose units zeroed, survivors too; None where no weight reads them."""
    read = {a.parameter for a in removal.axes if a.role == "read" and removal.gone[a.classes].any()}
    return {n: torch.zeros_like(t) if n in read else t for n, t in state.items()} if read else None


def _shows(one: list[Any], other: list[Any]) -> bool:
    """Whether they differ by more than a proof forgives."""
    return not distance(one, other) <= 10 * SINGLE * scale_of(one)


def tells(dense: list[Any], masked: list[Any]) -> bool:
    """Whether the output is finite and moved: otherwise equality would prove nothing."""
    scale, move = scale_of(dense), distance(masked, dense)
    return math.isfinite(scale) and math.isfinite(move) and move > 1e-6 * scale


def same_in_train(program: Program, module: nn.Module, graph: nn.Module, known: Reference, *, seed: int = 0) -> bool:
    """Whether the user's class, cut, computes in train mode what the rewritten train graph does.

    The proof is made in eval mode; what only train mode does, or an attribute that only train mode reads and that happens to
    equal a size, would not show there. Both draw the same random numbers, since their shapes are the same.
    """
    if program.train_graph is None:
        return True
    outputs = []
    for one in (module, graph):
        state = {n: t.clone() for n, t in _for_call(one, known.state).items()}
        args, kwargs = pytree.tree_map(lambda t: _clone(in_dtype(t, known.dtype)), program.inputs)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), one_dtype(program, known.dtype):
            torch.manual_seed(seed)
            one.train()
            try:
                outputs.append(pytree.tree_leaves(functional_call(one, state, args, kwargs, tie_weights=False)))
            finally:
                one.eval()
    return distance(*outputs) <= SINGLE * scale_of(outputs[1])


def _for_call(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state that a module has, each slot once.

    A module object that is there under two paths has one slot for each of its tensors: functional_call would save the
    tensor that it put in itself as the original of the second name, and leave it behind.
    """
    slots: dict[tuple[int, str], str] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            name = f"{path}.{leaf}" if path else leaf
            if tensor is not None and name in state:
                slots.setdefault((id(owner), leaf), name)
    return {name: state[name] for name in slots.values()}


def prove(program: Program, module: nn.Module, removal: Removal, known: Reference, *, seed: int = 0) -> Proof:
    """Compare `module` (pruned) with the dense graph in which every read of a removed unit is zeroed.

    About structure, not about the user's weights: parameters and norm statistics are seeded random values of healthy
    scale, so that every channel matters and a wrong index shows. Across a norm axis the dense graph normalises over
    the survivors only. Holds where max |pruned - masked dense| ≤ 1e-4 × max |dense| in float32, or, if not, ≤ 1e-9 in
    float64, and in both cases ≤ a tenth of `Proof.moved`, which says how far the removal moves the output.

    Raises VerificationError with the Proof as evidence.
    """
    proof = compare(module, known)
    if not holds(proof):
        proof = compare(module, reference(program, removal, seed=seed, dtype=torch.float64))
    if not holds(proof):
        msg = (
            f"pruned must equal dense with the removed units' reads zeroed. Got a difference of {proof.max_error:.2e} at output "
            f"scale {proof.scale:.2e} in {proof.mode}. This is a fault of paredown or of an attribute it cannot see: please report the model."
        )
        raise VerificationError(msg, proof)
    return proof


def holds(proof: Proof) -> bool:
    """Whether the error is within the tolerance of the proof's dtype, and small beside what the removal does."""
    tolerance = SINGLE if proof.mode == "float32" else DOUBLE
    return proof.max_error <= min(tolerance * proof.scale, 0.1 * proof.moved)


def own_move(program: Program, module: nn.Module) -> float:
    """max |pruned - dense| on the user's own weights and example inputs."""
    found = math.inf
    for example in (own_example(program), program.inputs):
        args, kwargs = example
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            dense = run_dense(program, program.state, (args, kwargs), None)
            torch.manual_seed(0)
            pruned = module(*args, **kwargs)
        found = distance(pytree.tree_leaves(pruned), dense)
        if math.isfinite(found):  # else a network that compares its samples with each other: one has no deviation
            break
    return found


def compare(module: nn.Module, known: Reference) -> Proof:
    """A module run on the reference's random state against its masked outputs: the numbers, without a verdict."""
    args, kwargs = pytree.tree_map(_clone, known.inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), one_dtype(known.program, known.dtype):
        torch.manual_seed(0)
        pruned = functional_call(module, _for_call(module, known.state), args, kwargs, tie_weights=False)
    return Proof(
        max_error=distance(pytree.tree_leaves(pruned), known.masked),
        scale=scale_of(known.dense),
        moved=distance(known.masked, known.dense),
        mode="float32" if known.dtype == torch.float32 else "float64",
    )


def _zero_reads(state: dict[str, Tensor], removal: Removal) -> None:
    """Zero, in place, what reads removed units. The state is our own random one."""
    for axis in removal.axes:
        gone = removal.gone[axis.classes]
        if axis.role == "read" and gone.any():
            tensor = state[axis.parameter]
            view = [1] * tensor.dim()
            view[axis.axis] = -1
            tensor.mul_(torch.from_numpy(~gone).to(tensor.dtype).reshape(view))


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in a dtype, anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def run_dense(
    program: Program,
    state: Mapping[str, Tensor],
    inputs: Any,
    removal: Removal | None,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """Outputs of the dense eval graph; with a removal, norms see the survivors only. `dtype`: the one that all floats have, else their own."""
    flat = arguments(program, state, inputs)
    body = program.eval_graph.graph_module
    norms = _masked_norms(body, removal) if removal is not None else {}
    sums = _masked_sums(body, removal) if removal is not None else {}
    with torch.random.fork_rng(devices=[]), one_dtype(program, dtype) if dtype is not None else nullcontext():
        torch.manual_seed(0)  # noise that a network draws is the same in each run
        if not norms and not sums:
            return list(body(*flat))
        return list(_Masked(body, norms, sums).run(*flat, enable_io_processing=False))


def arguments(program: Program, state: Mapping[str, Tensor], inputs: Any) -> list[Any]:
    """What the eval graph takes, in its order: the state's tensors, and copies of the inputs."""
    names = placeholder_names(program.eval_graph)
    values = iter(pytree.tree_leaves(pytree.tree_map(_clone, inputs)))
    placeholders = [n.name for n in program.eval_graph.graph.nodes if n.op == "placeholder"]
    return [state[names[name]] if name in names else next(values) for name in placeholders]


def _masked_norms(gm: fx.GraphModule, removal: Removal) -> dict[fx.Node, Tensor]:
    out = {}
    for node in gm.graph.nodes:
        ids = removal.trace.norms.get(node)
        if ids is not None:
            alive = removal.alive(ids).expand(ids.shape)
            if not bool(alive.all()):
                out[node] = alive
    return out


def _masked_sums(gm: fx.GraphModule, removal: Removal) -> dict[fx.Node, tuple[fx.Node, Tensor]]:
    """Products of activations that sum over removed channels: (first operand, its mask)."""
    out = {}
    for node in gm.graph.nodes:
        summed = removal.trace.summed.get(node)
        if summed is not None:
            alive = removal.alive(summed.ids).expand(summed.ids.shape)
            if not bool(alive.all()):
                dims = summed.operand.meta["val"].dim()
                view = [1] * dims
                view[summed.axis] = -1
                out[node] = (summed.operand, alive.reshape(view))
    return out


class _Masked(fx.Interpreter):
    """Runs a graph with norms and statistics over the survivors of their axis, and products that do not read removed
    channels."""

    def __init__(
        self, gm: fx.GraphModule, norms: Mapping[fx.Node, Tensor], sums: Mapping[fx.Node, tuple[fx.Node, Tensor]]
    ) -> None:
        super().__init__(gm)
        self.norms, self.sums = norms, sums

    def run_node(self, n: fx.Node) -> Any:
        if n in self.sums:
            operand, mask = self.sums[n]
            whole = self.env[operand]
            self.env[operand] = whole * mask
            try:
                return super().run_node(n)
            finally:
                self.env[operand] = whole
        alive = self.norms.get(n)
        if alive is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if op_name(n) in _NORMS:
            return _masked_norm(n, alive, args, kwargs)
        if op_name(n) == "batch_norm":
            return _masked_rows(n, alive, args, kwargs)
        target: Any = n.target
        return target(*(_survivors(a, alive) if isinstance(a, Tensor) else a for a in args), **kwargs)


_NORMS = ("layer_norm", "rms_norm", "group_norm")


def _masked_rows(node: fx.Node, alive: Tensor, args: Any, kwargs: Any) -> Tensor:
    """batch_norm with the statistics of the survivors of each row, from the definition. x: [1, rows, entries]."""
    given = dict(zip((a.name for a in schema(node).arguments), args, strict=False)) | kwargs
    x: Tensor = args[0]
    kept = _survivors(x, alive).transpose(0, 1).flatten(1)
    mean, variance = kept.mean(1), kept.var(1, correction=0)
    view = (1, -1) + (1,) * (x.dim() - 2)
    out = (x - mean.reshape(view)) / torch.sqrt(variance + given["eps"]).reshape(view)
    out = out * given["weight"].reshape(view) if given.get("weight") is not None else out
    return out + given["bias"].reshape(view) if given.get("bias") is not None else out


def _survivors(x: Tensor, alive: Tensor) -> Tensor:
    """What a statistic over the channels is taken of: the operand without the positions that leave."""
    for axis in range(x.dim()):
        stays = alive.movedim(axis, 0).reshape(alive.shape[axis], -1).any(1)
        if not bool(stays.all()):
            x = x.index_select(axis, stays.nonzero().flatten())
    return x


def _masked_norm(node: fx.Node, alive: Tensor, args: Any, kwargs: Any) -> Tensor:
    """layer_norm, rms_norm or group_norm over the surviving elements, written from the definition."""
    x: Tensor = args[0]
    given = dict(zip((a.name for a in schema(node).arguments), args, strict=False)) | kwargs
    eps, weight, bias = given.get("eps"), given.get("weight"), given.get("bias")
    if op_name(node) == "group_norm":
        groups = int(given["num_groups"])
        table = x.reshape(x.shape[0], groups, -1)
        mask = alive.reshape(1, groups, -1, 1).expand(1, groups, -1, x[0, 0].numel()).reshape(1, groups, -1)
        axes: tuple[int, ...] = (2,)
        view: tuple[int, ...] = (1, -1) + (1,) * (x.dim() - 2)
    else:
        table, mask = x, alive
        axes, view = tuple(range(x.dim() - alive.dim(), x.dim())), tuple(alive.shape)
    count = mask.expand(table.shape).sum(axes, keepdim=True)
    zero = torch.zeros((), dtype=x.dtype)
    mean = torch.where(mask, table, zero).sum(axes, keepdim=True) / count
    if op_name(node) == "rms_norm":
        mean = torch.zeros_like(mean)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
    variance = torch.where(mask, table - mean, zero).square().sum(axes, keepdim=True) / count
    out = ((table - mean) / torch.sqrt(variance + (1e-5 if eps is None else eps))).reshape(x.shape)
    out = out * weight.reshape(view) if weight is not None else out
    return out + bias.reshape(view) if bias is not None else out


# ---------------------------------------------------------------------------------------------------- healthy numbers


def healthy(program: Program, seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """The state with every parameter and norm statistic replaced by seeded random values of healthy scale.

    Matrices and kernels: variance gain²/fan_in; norm weights and running variances: U(0.5, 1.5); other vectors and
    tables used element by element: variance 0.25. Buffers that are no statistics (masks, indices, positions, filters) stay.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = set(program.eval_graph.graph_signature.parameters) | (
        set(program.train_graph.graph_signature.parameters) if program.train_graph is not None else set()
    )
    # By tensor: the graphs may read a tied one under another name.
    roles = {id(program.state[name]): role for name, role in reversed(_roles(program).items())}
    learned = {id(program.state[name]) for name in parameters if name in program.state}
    out: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, tensor in program.state.items():
        role = roles.get(id(tensor))
        # Saved matrices stay: behind a filter bank there may be a logarithm.
        if not tensor.is_floating_point() or (id(tensor) not in learned and role not in ("scale", "shift")):
            out[name] = tensor
            continue
        if id(tensor) not in made:
            made[id(tensor)] = _random(tensor, role, generator, gain)
        out[name] = made[id(tensor)]
    return out


def _random(tensor: Tensor, role: str | None, generator: torch.Generator, gain: float) -> Tensor:
    shape = tensor.shape
    if role == "scale":
        return torch.rand(shape, generator=generator) + 0.5
    spread = 0.5
    if role in ("weight", "transposed"):
        outs = shape[0] if role == "weight" else shape[1]
        spread = gain / math.sqrt(max(tensor.numel() // outs, 1))
    # Uniform with that standard deviation: three times as fast to draw as normal.
    return torch.empty(shape).uniform_(-spread * math.sqrt(3), spread * math.sqrt(3), generator=generator)


def _roles(program: Program) -> dict[str, str]:
    """State name → "weight", "transposed", "scale" or "shift", by how the graphs use it."""
    roles: dict[str, str] = {}
    for graph in filter(None, (program.eval_graph, program.train_graph)):
        names = placeholder_names(graph)
        for node in graph.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            op = op_name(node)
            wanted = {
                "batch_norm": {"weight": "scale", "running_var": "scale", "running_mean": "shift"},
                "instance_norm": {"weight": "scale", "running_var": "scale", "running_mean": "shift"},
                "layer_norm": {"weight": "scale"},
                "group_norm": {"weight": "scale"},
                "rms_norm": {"weight": "scale"},
                "linear": {"weight": "weight"},
            }.get(op, {"weight": "transposed" if "transpose" in op else "weight"} if op.startswith("conv") else {})
            for argument, role in wanted.items():
                value = args_of(node, argument)[0]
                if isinstance(value, fx.Node) and value.name in names:
                    roles.setdefault(names[value.name], role)
            if op in (*recurrent.RULES, "matmul", "addmm", "einsum"):
                for value in node.all_input_nodes:
                    name = names.get(value.name)
                    if name is not None and program.state[name].dim() == 2:
                        roles.setdefault(name, "weight")
    return roles


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _real(value: Tensor) -> Tensor:
    """In float64; complex numbers as pairs, whose second part a cast would drop."""
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double()


def scale_of(outputs: list[Any]) -> float:
    """Largest magnitude over all outputs."""
    return max((float(_real(o).abs().max()) for o in outputs if isinstance(o, Tensor) and o.numel()), default=0.0)


def distance(left: list[Any], right: list[Any]) -> float:
    """Largest difference over all outputs, integers and truth values too; infinite where shapes or counts differ."""
    left, right = ([o for o in side if isinstance(o, Tensor)] for side in (left, right))
    if len(left) != len(right) or any(a.shape != b.shape for a, b in zip(left, right, strict=False)):
        return math.inf
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if a.numel():
            gap = float((_real(a) - _real(b)).abs().max())
            worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst
