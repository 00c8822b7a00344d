"""How many inner channels each block of a CIFAR ResNet keeps: least measured loss for the MACs saved, and which ones.

For the block's second convolution, from the Gram matrix H of its input patches (dense network, training batches):
channels leave one by one, each time the one whose loss the others can make up for best: tr(W_c (H⁻¹)_cc⁻¹ W_cᵀ) is the
squared error that stays after all other weights were fitted anew (Hassibi & Stork 1993, for groups of columns). For some
counts the KL divergence to the dense network's outputs is then measured with that one layer fitted, all else dense, and
a knapsack over the blocks takes the counts with the least sum. Training images only.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paredown as pare
from paredown.train.task import seed_all

RIDGE = 1e-3
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def blocks(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if hasattr(m, "conv2") and hasattr(m, "bn2")]


def table(dense: nn.Module, task: Any, *, num_batches: int = 8, seed: int = 0) -> dict[str, dict[str, Any]]:
    """By block: `order` in which channels leave, and `loss` by number of kept channels."""
    seed_all(seed)
    statistics = _statistics(dense, task, num_batches)
    images = [x for _, (x, _) in zip(range(6), task.train_batches(), strict=False)]
    with torch.no_grad():
        wanted = [F.log_softmax(dense(x), 1) for x in images]
    found = {}
    for name in blocks(dense):
        block: Any = dense.get_submodule(name)
        mean, gram = statistics[name]
        scale = block.bn2.weight / torch.sqrt(block.bn2.running_var + block.bn2.eps)
        order = eliminated(gram, (block.conv2.weight.flatten(1) * scale[:, None]).detach().double())
        losses = {}
        for kept in sorted({max(1, round(len(order) * share)) for share in SHARES}):
            model = _fitted(dense, name, mean, gram, order[len(order) - kept :])
            with torch.no_grad():
                apart = [
                    (t.exp() * (t - F.log_softmax(model(x), 1))).sum(1).mean()
                    for x, t in zip(images, wanted, strict=True)
                ]
            losses[kept] = float(torch.stack(apart).mean())
        found[name] = {"order": order, "loss": losses}
    return found


def _statistics(dense: nn.Module, task: Any, num_batches: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean [K] and centred Gram matrix [K, K] of the patches that each second convolution reads."""
    sums: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
            x = F.unfold(inputs[0], module.kernel_size, padding=module.padding, stride=module.stride)
            rows = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
            count, total, gram = sums.get(name, (0, 0, 0))
            sums[name] = count + len(rows), total + rows.sum(0), gram + rows.T @ rows

        return hook

    handles = [dense.get_submodule(n).conv2.register_forward_pre_hook(note(n)) for n in blocks(dense)]
    with torch.no_grad():
        for _, (x, _) in zip(range(num_batches), task.train_batches(), strict=False):
            dense(x)
    for handle in handles:
        handle.remove()
    return {n: (t / c, g / c - torch.outer(t / c, t / c)) for n, (c, t, g) in sums.items()}


def eliminated(gram: Tensor, weight: Tensor) -> list[int]:
    """Channels in the order in which they leave; the last one stays longest. gram [C·9, C·9], weight [out, C·9]."""
    width = 9
    inverse = torch.linalg.inv(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    weight, alive, order = weight.clone(), list(range(len(gram) // width)), []
    while len(alive) > 1:
        errors = []
        for c in alive:
            at = slice(width * c, width * (c + 1))
            errors.append(float((torch.linalg.solve(inverse[at, at], weight[:, at].T) * weight[:, at].T).sum()))
        leaving = alive.pop(int(np.argmin(errors)))
        at = slice(width * leaving, width * (leaving + 1))
        step = torch.linalg.solve(inverse[at, at], inverse[at, :])
        weight, inverse = weight - weight[:, at] @ step, inverse - inverse[:, at] @ step
        order.append(leaving)
    return order + alive


def _fitted(dense: nn.Module, name: str, mean: Tensor, gram: Tensor, kept: list[int]) -> nn.Module:
    """The dense network with one second convolution that reads `kept` only, fitted anew."""
    model = copy.deepcopy(dense)
    block: Any = model.get_submodule(name)
    old = block.conv2.weight.detach().flatten(1).double()
    columns = torch.tensor([9 * c + i for c in sorted(kept) for i in range(9)])
    part = gram[columns][:, columns] + RIDGE * gram.diagonal().mean() * torch.eye(len(columns), dtype=gram.dtype)
    new = torch.zeros_like(old)
    right = (old @ gram)[:, columns] - old[:, columns] @ gram[columns][:, columns]
    new[:, columns] = old[:, columns] + torch.linalg.solve(part, right.T).T
    with torch.no_grad():
        block.conv2.weight.copy_(new.reshape(block.conv2.weight.shape))
        block.bn2.running_mean -= ((old - new) @ mean).float()
    return model


def counts(dense: nn.Module, found: dict[str, dict[str, Any]], macs: int, *, align: int = 1) -> dict[str, int]:
    """Kept channels by block with the least sum of losses (log-linear between those measured) at ≤ `macs` MACs."""
    per = {n: _macs_per_channel(dense, n) for n in found}
    unit = math.gcd(*per.values())
    total = pare.examine(pare.capture(dense, torch.zeros(2, 3, 32, 32), train=False)).macs
    saved_at_least = -(-(total - macs) // unit)
    most = saved_at_least + max(per.values()) // unit * align
    best, choices = np.full(most + 1, np.inf), []
    best[0] = 0.0
    for name, entry in found.items():
        size, loss = len(entry["order"]), _curve(entry)
        new, choice = np.full(most + 1, np.inf), np.zeros(most + 1, dtype=int)
        for kept in {*range(align, size, align), size}:
            saved = (size - kept) * per[name] // unit
            if saved > most:
                continue
            candidate = best[: most + 1 - saved] + loss[kept]
            better = candidate < new[saved:]
            new[saved:][better], choice[saved:][better] = candidate[better], kept
        best = new
        choices.append(choice)
    at = saved_at_least + int(np.argmin(best[saved_at_least:]))
    out = {}
    for name, choice in zip(reversed(found), reversed(choices), strict=True):
        out[name] = int(choice[at])
        at -= (len(found[name]["order"]) - out[name]) * per[name] // unit
    return dict(reversed(out.items()))


def _curve(entry: dict[str, Any]) -> np.ndarray:
    """Loss by kept count 0…C; 0 at C."""
    size = len(entry["order"])
    known = {int(k): max(v, 1e-5) for k, v in entry["loss"].items()} | {size: 1e-5}
    at = sorted(known)
    loss = np.exp(np.interp(np.arange(size + 1), at, [math.log(known[k]) for k in at]))
    loss[size] = 0.0
    return loss


def _macs_per_channel(dense: nn.Module, name: str) -> int:
    block: Any = dense.get_submodule(name)
    pixels = {16: 1024, 32: 256, 64: 64}[block.conv2.out_channels]
    return 9 * pixels * (block.conv1.in_channels + block.conv2.out_channels)


def plan(found: dict[str, dict[str, Any]], kept: dict[str, int]) -> pare.Plan:
    """The plan that keeps the channels that leave last."""
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, number in kept.items():
        order = found[name]["order"]
        if number < len(order):
            stays = tuple(sorted(order[len(order) - number :]))
            rows = ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
            keep |= {f"{name}.{row}": {0: stays} for row in rows} | {f"{name}.conv2.weight": {1: stays}}
    return pare.Plan(keep=keep, made_by={"allocation": "knapsack on measured loss", "kept": kept})
