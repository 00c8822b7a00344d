"""A plain copy of a user's model: unwrapped, unfolded, in float; or a refusal that says why."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.errors import RejectedError


def plain_copy(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A deep copy in float form: unwrapped, with parametrizations and pruning masks folded into plain weights."""
    notes: list[str] = []
    kind: object = model
    if not isinstance(kind, nn.Module):
        msg = f"the model must be an nn.Module. Got {type(kind).__name__}."
        raise RejectedError(msg)
    if isinstance(model, torch.jit.ScriptModule):
        msg = (
            "the model must be a plain nn.Module. Got a TorchScript module. Pass the Python class with its state_dict."
        )
        raise RejectedError(msg)
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            break
        notes.append(f"unwrapped {type(model).__name__}")
        model = inner
    _refuse_quantized(model)
    try:
        model = deep_copy(model)
    except Exception as error:
        msg = f"the model must allow copy.deepcopy, because paredown never changes the original. Got {type(error).__name__}: {error}."
        raise RejectedError(msg) from error
    notes += _fold(model)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        msg = "the model must be initialised. Got lazy modules without a shape. Run it once on an example first."
        raise RejectedError(msg)
    model.to("cpu")
    return model, tuple(notes)


def deep_copy(model: nn.Module) -> nn.Module:
    """copy.deepcopy, also of modules that keep results of a computation (torch's masks, old weight norm), which refuse it."""
    memo: dict[int, Any] = {
        id(v): v.detach().clone()
        for m in model.modules()
        for v in vars(m).values()
        if isinstance(v, Tensor) and v.grad_fn is not None
    }
    return copy.deepcopy(model, memo)


def _fold(model: nn.Module) -> list[str]:
    """Fold parametrizations, old-style weight/spectral norm and torch pruning masks into plain parameters, in place."""
    from torch.nn.utils import parametrize, prune

    notes = []
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            # torch takes the property off the class, and a deep copy shares its class with the user's module.
            made = type(module)
            module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
            for parameter in list(module.parametrizations):
                parametrize.remove_parametrizations(module, str(parameter), leave_parametrized=True)
                notes.append(f"folded a parametrization into {name}.{parameter}")
        for hook in list(module._forward_pre_hooks.values()):
            kind = type(hook).__name__
            if isinstance(hook, prune.BasePruningMethod):
                tensor = hook._tensor_name
                prune.remove(module, tensor)
                notes.append(
                    f"folded a pruning mask into {name}.{tensor}: its zeros are kept in training with take_over(model)"
                )
            elif kind == "WeightNorm":
                torch.nn.utils.remove_weight_norm(module, hook.name)
                notes.append(f"folded weight norm into {name}.{hook.name}")
            elif kind == "SpectralNorm":
                torch.nn.utils.remove_spectral_norm(module, hook.name)
                _forget_loading(module)
                notes.append(f"folded spectral norm into {name}.{hook.name}")
    return notes


def _forget_loading(module: nn.Module) -> None:
    """torch wraps this hook, then looks for it unwrapped, and leaves it: the plain weight could never be loaded again."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if type(getattr(hook, "hook", hook)).__name__ == "SpectralNormLoadStateDictPreHook":
            del hooks[key]


def refuse_bad_weights(model: nn.Module) -> None:
    """Weights must be finite real numbers; raises RejectedError with the layers."""
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "running_" in n)]
    bad = [n for n, p in named if p.is_complex()]
    if bad:
        msg = f"weights must be real numbers. Got complex weights in {_some(bad)}."
        raise RejectedError(msg)
    bad = [n for n, p in named if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if bad:
        msg = f"weights must be finite. Got NaN or infinity in {_some(bad)}. Load a checkpoint from before the training diverged."
        raise RejectedError(msg)


def _refuse_quantized(model: nn.Module) -> None:
    """Codes are not weights: pruning or quantizing them once more would work on rounded numbers, or on none."""
    found = [n or type(m).__name__ for n, m in model.named_modules() if _is_quantized_layer(m)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = type(tensor.data)
        if tensor.is_quantized or (kind.__module__.startswith(("torchao.", "optimum.quanto", "bitsandbytes"))):
            found.append(name)
    found += [f"{n or 'the graph'} ({op})" for n, m in model.named_modules() if (op := _coded_op(m))]
    if found:
        msg = f"the model must be in float. Got quantized layers: {_some(list(dict.fromkeys(found)))}. Pass the float model it was made from."
        raise RejectedError(msg)


def _is_quantized_layer(module: nn.Module) -> bool:
    """Layers of torch.ao, and those of GPTQ, AWQ and their like: packed integer codes beside scales, in whatever library."""
    where, kept = type(module).__module__, dict(module.named_buffers(recurse=False))
    codes = next((t for n, t in kept.items() if n in ("qweight", "weight_packed", "int_weight")), None)
    packed = codes is not None and not codes.is_floating_point() and any("scale" in n for n in kept)
    return packed or (
        ".quantized" in where and where.startswith(("torch.ao.nn.", "torch.nn.quantized")) and ".qat" not in where
    )


def _coded_op(module: nn.Module) -> str:
    """The first op of a converted graph that makes values of codes; "" where there is none."""
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    ops = (str(n.target) for n in nodes if n.op == "call_function")
    return next((op for op in ops if op.startswith(("quantized_decomposed.", "torchao."))), "")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
