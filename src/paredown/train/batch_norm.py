"""Batch-norm statistics measured anew: once channels are gone, the stored ones are those of another network.

One code path for both realisers: the eval graph runs with batch norm alone in train mode, so dropout and drop path
stay off, and each batch leaves its own mean and variance in the buffers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.errors import RejectedError
from paredown.program import GraphModel, capture, placeholder_names, trainable_copy
from paredown.statistics.batches import Given, once, taken
from paredown.train.loop import memory_of, on_device, private_copy, usable_device
from paredown.train.task import Step, batch_length, call_inputs, kept_randomness, seed_all

_STATISTICS = {3: "running_mean", 4: "running_var"}
"""Argument positions of aten.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, …)."""


def reestimate_batch_norm(
    module: nn.Module,
    batches: Given,
    inputs: Any,
    *,
    step: Step | None = None,
    num_batches: int = 100,
    seed: int = 0,
    device: str = "cpu",
) -> nn.Module:
    """A copy of `module` in eval mode whose running means and variances are those of the given batches.

    mean = Σ_b n_b mean_b / Σ_b n_b and var = Σ_b n_b var_b / Σ_b n_b over batches of n_b samples, var_b unbiased as
    torch keeps it; a norm used k times in one forward averages over its uses. All else is untouched, also the batch
    counter.

    `batches()` must yield *training batches as they are trained on*: on images without their augmentation the
    untouched ResNet-20 loses three points. They go through the user's `step(model, batch)`, whose model is a stand-in
    with the same inputs and outputs; without `step` a batch is inputs alone. `inputs` is an example, as for capture.

    Raises RejectedError (no batches, statistics that are not finite) and CaptureError.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    >>> x = torch.randn(8, 1, 4, 4) + 3
    >>> new = reestimate_batch_norm(net, lambda: [x], x)
    >>> bool(torch.allclose(new[1].running_mean, new[0](x).mean((0, 2, 3)), atol=1e-5))
    True
    """
    result = private_copy(module).eval()
    if not any(name.endswith("running_var") for name, _ in module.named_buffers()):
        return result
    where = usable_device(device)
    stand_in, names = _stand_in(module, inputs)
    if not names:
        return result
    stand_in, own = stand_in.to(where), private_copy(module).to(where).train()
    own.register_forward_pre_hook(lambda _, args, kwargs: (stand_in(*args, **kwargs), None)[1], with_kwargs=True)
    with kept_randomness(), torch.no_grad(), memory_of(where):
        seed_all(seed)
        means = _averages((stand_in, own), names, taken(once(batches), num_batches), step, where)
        buffers = dict(result.named_buffers(remove_duplicate=False))
        for name, mean in means.items():
            if not bool(torch.isfinite(mean).all()):
                msg = (
                    f"batch-norm statistics must be finite. Got NaN or infinity in {name}. "
                    "Look for NaN in the batches, and for batches of one sample."
                )
                raise RejectedError(msg)
            buffers[name].copy_(mean)
    return result


def _stand_in(module: nn.Module, inputs: Any) -> tuple[nn.Module, list[str]]:
    """The eval graph as a module, batch norm in train mode in both its modes; the names of the statistics it writes."""
    program = capture(module, inputs, train=False)
    graph = program.eval_graph
    body = trainable_copy(graph.graph_module, dropout=False, momentum=1.0)
    names, placeholders, uses = [], placeholder_names(graph), dict[str, int]()
    for node in body.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        arguments = list(node.args)
        for position in _STATISTICS:
            buffer = arguments[position]
            if not isinstance(buffer, fx.Node) or buffer.name not in placeholders:
                continue
            name = placeholders[buffer.name]
            names.append(name)
            uses[name] = uses.get(name, 0) + 1
            arguments[6] = 1.0 / uses[name]  # momentum 1, 1/2, 1/3, … makes the buffer the mean over its uses
        node.args = tuple(arguments)
    body.recompile()
    state = {
        name: tensor.detach().clone() if isinstance(tensor, Tensor) else tensor
        for name, tensor in program.state.items()
    }
    return GraphModel(graph, None, state, bodies=(body, body)), list(dict.fromkeys(names))


def _stepped(step: Step, chosen: nn.Module, own: nn.Module, batch: Any) -> nn.Module:
    """Whichever model the step runs with."""
    try:
        step(chosen, batch)
    except Exception:  # the user's code, about the outputs it got
        if chosen is own:
            raise
        step(own, batch)
        return own
    return chosen


def _averages(
    models: tuple[nn.Module, nn.Module],
    names: list[str],
    batches: Iterable[Any],
    step: Step | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Sample-weighted means of the statistics that each batch leaves behind, float64 on the CPU.

    `models`: the stand-in, and the user's own class, which runs it first. A step that wants what the class gives in training, as the outputs of an
    auxiliary head, fails on the stand-in and gets the class.
    """
    stand_in, chosen = models[0], models[0]
    buffers = dict(stand_in.named_buffers())
    sums = {name: torch.zeros(buffers[name].shape, dtype=torch.float64) for name in names}
    num_samples, usual = 0, 0
    for batch in batches:
        length = batch_length(batch)
        usual = max(usual, length)
        if length == 1 < usual:
            continue  # the variance of one sample says nothing
        batch = on_device(batch, device)  # noqa: PLW2901
        if step is None:
            args, kwargs = call_inputs(batch)
            stand_in(*args, **kwargs)
        else:
            chosen = _stepped(step, chosen, models[1], batch)
        num_samples += length
        for name in names:
            sums[name] += length * buffers[name].double().cpu()
    if num_samples == 0:
        msg = (
            "batches must yield at least one batch to estimate batch norm from. Got none. A generator must be made "
            "anew at each call."
        )
        raise RejectedError(msg)
    return {name: total / num_samples for name, total in sums.items()}
