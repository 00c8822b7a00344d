"""synflow: synaptic flow, without data (Tanaka et al. 2020, "Pruning neural networks without any data", eq. 2).

R = 1ᵀ f(1; |θ|) and the score is |∂R/∂θ ⊙ θ|. All parameters and batch-norm statistics are replaced by their absolute values,
in eval mode and float64: in float32 deep nets overflow. Inputs of integers (tokens) stay as captured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError
from paredown.score.nouns import Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class SynflowOptions:
    """No options."""


def synflow(source: Source, options: SynflowOptions) -> Iterator[Elements]:
    """Element saliency |∂R/∂θ · θ|, float64. In a chain without biases every layer's scores sum up to R."""
    del options
    model = _positive(source.module)
    known = dict(model.named_parameters(remove_duplicate=False))
    missing = [n for n in source.weights if n not in known]
    if missing:
        msg = f"the module must have the program's parameters. Got none named {missing[0]!r}. Pass the captured model."
        raise RejectedError(msg)
    wanted = {id(known[n]): known[n] for n in source.weights if known[n].is_floating_point()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    seen = set()

    def take(parameter: Any) -> None:
        """The parameter is not read again in this pass: it becomes its own score, and nothing else is held."""
        with torch.no_grad():
            parameter.mul_(parameter.grad).abs_()
        parameter.grad = None
        seen.add(id(parameter))

    for parameter in wanted.values():
        parameter.register_post_accumulate_grad_hook(take)
    args, kwargs = pytree.tree_map(_ones, tuple(source.program.inputs))
    with _in_double(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            outputs = model(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            msg = f"synflow must be able to run the model in float64. Got {type(error).__name__}: {error}."
            raise RejectedError(msg) from error
        parts = [o.sum() for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.is_floating_point()]
        torch.stack(parts).sum().backward()
    yield {
        n: known[n].detach() if id(known[n]) in seen else torch.zeros_like(known[n], dtype=torch.float64)
        for n in source.weights
    }


def _positive(module: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode with |parameters| and |statistics|."""
    model = copy.deepcopy(module).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.abs_()
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and name.rpartition(".")[2].startswith("running_"):
                buffer.abs_()
    return model


def _ones(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.ones_like(value, dtype=torch.float64) if value.is_floating_point() else value.clone()


@contextmanager
def _in_double() -> Iterator[None]:
    """Tensors that forward makes are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
