"""What a pruned model must equal, from the user's own class and the definition alone: reads of removed units zeroed."""

from __future__ import annotations

import copy
import functools
import hashlib
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

from hazards import HAZARDS, Hazard, Statistic, built
from paredown.couple import Coupling, couple
from paredown.plan import Plan
from paredown.program import Program, capture

Removed = Mapping[int, Any]
"""Space number → unit numbers."""


def captured(name: str) -> tuple[Program, Coupling]:
    """A hazard and its coupling, made once for all tests of a process: both are immutable, and `changed` looks."""
    _TAKEN.add(name)
    return _captured(name)


@functools.cache
def _captured(name: str) -> tuple[Program, Coupling]:
    args, kwargs = HAZARDS[name].inputs(2)
    before = digest(built(name))
    program = capture(built(name), {"args": args, "kwargs": kwargs})
    assert digest(built(name)) == before, "the user's model must stay as it was"
    with within(10):
        coupling = couple(program)
    _PRINTS[name] = _print_of(program)
    return program, coupling


_TAKEN: set[str] = set()
_PRINTS: dict[str, str] = {}


def changed(name: str = "") -> list[str]:
    """Those of `name` and the hazards taken since the last call that are no longer what came from capture."""
    taken = sorted((_TAKEN | {name}) & _PRINTS.keys())
    _TAKEN.clear()
    return [name for name in taken if _PRINTS[name] != _print_of(_captured(name)[0])]


def _print_of(program: Program) -> str:
    """Everything that a verb could change by mistake: state, both graphs, the copied module, inputs."""
    out = hashlib.sha256(digest(program.module).encode())
    for name, tensor in program.state.items():
        out.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode() + _bytes(tensor))
    for graph in filter(None, (program.eval_graph, program.train_graph)):
        out.update(graph.graph_module.code.encode())
        for node in graph.graph.nodes:
            out.update(f"{node.name} {node.target} {node.args} {node.kwargs} {sorted(node.meta)}".encode())
    for leaf in pytree.tree_leaves(program.inputs):
        out.update(_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return out.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Stop what does not come to an end."""

    def stop(*_: Any) -> None:
        msg = f"not done after {seconds} s"
        raise TimeoutError(msg)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again and again: one that hits a destructor is swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def removed_units(coupling: Coupling, seed: int, share: float = 0.4) -> dict[int, Any]:
    """A random `share` of every space, at least one unit and never all."""
    rng = np.random.default_rng(seed)
    return {
        number: np.sort(rng.permutation(len(space))[: max(1, round(share * len(space)))])
        for number, space in enumerate(coupling.spaces)
        if len(space) > 1
    }


def plan_of(program: Program, coupling: Coupling, removed: Removed) -> Plan:
    """The plan that removes these units: what each parameter axis keeps."""
    gone: dict[tuple[str, int], set[int]] = defaultdict(set)
    for number, units in removed.items():
        for f in coupling.spaces[number].footprints:
            gone[(f.parameter, f.axis)] |= set(f.indices[units].ravel().tolist())
    keep: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for (parameter, axis), leaving in gone.items():
        keep[parameter][axis] = tuple(i for i in range(program.state[parameter].shape[axis]) if i not in leaving)
    return Plan(keep=keep)


def zeroed(model: nn.Module, coupling: Coupling, removed: Removed, hazard: Hazard) -> nn.Module:
    """A copy of the user's model in which nothing reads a removed unit; norms see the survivors only."""
    model = plain(model)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    gone: dict[tuple[str, int], list[int]] = defaultdict(list)
    with torch.no_grad():
        for number, units in removed.items():
            for f in coupling.spaces[number].footprints:
                leaving = f.indices[units].ravel().tolist()
                gone[(f.parameter, f.axis)] += leaving
                if (f.role == "read" or hazard.zero_writes) and f.parameter in tensors:
                    tensors[f.parameter].index_fill_(f.axis, torch.tensor(leaving), 0.0)
                assert f.role != "read" or f.parameter in tensors
    for name, module in list(model.named_modules()):
        leaving = gone[hazard.norms.get(name, (f"{name}.weight", 0))]
        if leaving and isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, MaskedNorm(module, leaving))
        elif leaving and isinstance(module, Statistic):
            module.leaving = frozenset(leaving)
    return model


def plain(model: nn.Module) -> nn.Module:
    """A copy with parametrizations and masks folded, by torch's own functions."""
    source = model
    memo = {
        id(v): v.detach().clone()
        for m in source.modules()
        for v in vars(m).values()
        if isinstance(v, Tensor) and v.grad_fn is not None
    }
    model = copy.deepcopy(source, memo)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            kind = type(module)  # torch removes the property from the class, which a deep copy shares with its source
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            for name in list(module.parametrizations):  # type: ignore[union-attr,arg-type]
                parametrize.remove_parametrizations(module, name)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif type(hook).__name__ == "WeightNorm":
                nn.utils.remove_weight_norm(module)
    return model


class MaskedNorm(nn.Module):
    """A layer, RMS or group norm whose mean and variance are those of the surviving channels."""

    def __init__(self, norm: Any, leaving: list[int]) -> None:
        super().__init__()
        self.norm = norm
        self.eps, self.weight, self.bias = norm.eps, norm.weight, getattr(norm, "bias", None)
        self.leaving = sorted(set(leaving))

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        grouped = isinstance(norm, nn.GroupNorm)
        images = grouped or type(norm).__name__ == "LayerNorm2d"  # channels first
        if len(getattr(norm, "normalized_shape", ())) > 1:
            return self._over_a_map(x)
        rows = x.movedim(1, -1) if images else x
        channels = rows.shape[-1]
        kept = [i for i in range(channels) if i not in self.leaving]
        out = torch.zeros_like(rows)
        if grouped:
            size = channels // norm.num_groups
            for g in range(norm.num_groups):
                mine = [i for i in kept if i // size == g]
                if mine:
                    y = rows[..., mine].flatten(1)
                    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + norm.eps).sqrt()
                    out[..., mine] = y.reshape(*rows.shape[:-1], len(mine))
        else:
            y = rows[..., kept]
            eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
            if isinstance(norm, nn.LayerNorm):
                y = y - y.mean(-1, keepdim=True)
            out[..., kept] = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
        if norm.weight is not None:
            out = out * norm.weight
        if getattr(norm, "bias", None) is not None:
            out = out + norm.bias
        return out.movedim(-1, 1) if images else out

    def _over_a_map(self, x: Tensor) -> Tensor:
        """Over channels, rows and columns at once."""
        norm: Any = self.norm
        kept = [i for i in range(x.shape[1]) if i not in self.leaving]
        y = x[:, kept].flatten(1)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + norm.eps).sqrt()
        out = torch.zeros_like(x)
        out[:, kept] = y.reshape(x.shape[0], len(kept), *x.shape[2:])
        return out * norm.weight + norm.bias


def run(model: nn.Module, inputs: Any, seed: int = 0) -> list[Tensor]:
    """Float outputs as a flat list; the inputs are not changed."""
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    torch.manual_seed(seed)
    torch.backends.mha.set_fastpath_enabled(False)  # it looks at weights, not at modules
    with torch.no_grad():
        return floats(model(*args, **kwargs))


def floats(outputs: Any) -> list[Tensor]:
    return [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.is_floating_point()]


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """Largest difference; the structures must agree."""
    assert [tuple(t.shape) for t in left] == [tuple(t.shape) for t in right]
    assert left
    assert all(bool(torch.isfinite(t).all()) for t in (*left, *right))
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True))


def scale(outputs: list[Tensor]) -> float:
    return max(float(o.abs().max()) for o in outputs)


def doubled(inputs: Any) -> Any:
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)


def digest(model: nn.Module) -> str:
    """Names, bytes, requires_grad and training flags of everything in a model."""
    out = hashlib.sha256()
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        out.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad} {id(tensor)}".encode())
        out.update(_bytes(tensor))
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        out.update(
            f"{name} {type(module).__name__} {module.training} {hooks} {sorted(k for k in vars(module))}".encode()
        )
    return out.hexdigest()
