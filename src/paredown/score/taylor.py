"""taylor: first-order change of the loss when a unit goes (Molchanov et al. 2019, "Importance estimation", eq. 8).

I_m = (Σ_{s in m} g_s w_s)², averaged over batches. Where we differ: batch norms run in eval mode on their stored
statistics, so that the model is not changed and the score does not depend on what else is in a batch.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paredown.errors import RejectedError, UsageError
from paredown.score.nouns import Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class TaylorOptions:
    """No options."""


def taylor(source: Source, options: TaylorOptions) -> Iterator[Elements]:
    """Element saliency g·w, signed, one map for each of the first `num_batches` batches."""
    del options
    if source.batches is None or source.loss is None:
        msg = "taylor must be given batches and a loss. Got None. Pass batches=… and loss=lambda model, batch: scalar."
        raise UsageError(msg)
    model = copy.deepcopy(source.module).eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [n for n in source.weights if n not in parameters]
    if missing:
        msg = f"the module must have the program's parameters. Got none named {missing[0]!r}. Pass the captured model."
        raise RejectedError(msg)
    for parameter in parameters.values():
        parameter.requires_grad_(parameter.is_floating_point())
    seen = 0
    for number, batch in enumerate(itertools.islice(source.batches, source.num_batches)):
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(source.seed + number)
            _backward(source, model, batch, number)
        seen += 1
        yield {n: _product(parameters[n]).cpu() for n in source.weights}
    if seen == 0:
        msg = "batches must hold at least one batch. Got none."
        raise RejectedError(msg)


def _backward(source: Source, model: nn.Module, batch: object, number: int) -> None:
    assert source.loss is not None  # checked by the caller
    with torch.enable_grad():
        loss = source.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            msg = f"a loss must be a scalar tensor that depends on the model. Got {got} at batch {number}."
            raise RejectedError(msg)
        if not bool(torch.isfinite(loss)):
            msg = f"a loss must be finite. Got {loss.item()} at batch {number}. Look at that batch and its labels."
            raise RejectedError(msg)
        loss.reshape(()).backward()


def _product(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else (parameter.grad * parameter).detach()
