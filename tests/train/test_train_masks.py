"""Zeros that stay zero in training: through momentum, weight decay and any loop, checked against the same run without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paredown.errors import UsageError, VerificationError
from paredown.plan import Mask, Plan
from paredown.program import capture
from paredown.prune import prune
from paredown.prune.nouns import Pruned
from paredown.train import Hook, fit, keep_masks, recover
from paredown.train.masks import check_zeros, mask_hook

X = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (48,), generator=torch.Generator().manual_seed(2))


def batches() -> Any:
    return [(X[i : i + 12], Y[i : i + 12]) for i in range(0, 48, 12)]


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def small(tied: bool = False) -> Pruned:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3),
    )  # fmt: skip
    if tied:
        net[8].weight = net[6].weight
    rng = np.random.default_rng(0)
    masks = {
        n: Mask.of(rng.random(tuple(net.get_parameter(n).shape)) > 0.6, "element")
        for n in ("0.weight", "3.weight", "6.weight")
    }
    return prune(capture(net, X[:2]), Plan(keep={}, masks=masks))


def alive(module: nn.Module, plan: Plan) -> int:
    """By hand: elements under a zero of a mask that are not zero."""
    return sum(int(np.count_nonzero(module.get_parameter(n).detach().numpy()[~m.kept])) for n, m in plan.masks.items())


OPTIMIZERS: dict[str, Any] = {
    "sgd": "sgd",
    "adamw": "adamw",
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_recover_keeps_zeros_and_without_the_hook_they_come_alive(name: str, tied: bool) -> None:
    pruned = small(tied)
    options: dict[str, Any] = {"epochs": 2, "optimizer": OPTIMIZERS[name], "lr": 0.05, "weight_decay": 5e-4}
    tuned = recover(pruned, batches, step=step, **options)
    assert alive(tuned.module, pruned.plan) == 0
    free = fit(pruned.module, batches, step, **options).module
    assert alive(free, pruned.plan) > 50  # not vacuous
    moved = [n for n, p in tuned.module.named_parameters() if not torch.equal(p, pruned.module.get_parameter(n))]
    assert {"0.weight", "3.weight", "6.weight"} <= set(moved)  # what is kept does train
    if tied:
        assert tuned.module[6].weight is tuned.module[8].weight  # type: ignore[index]


def test_momentum_from_before_the_masks_revives_nothing() -> None:
    pruned = small()
    module = copy.deepcopy(pruned.module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for batch in batches():  # momentum gathers without masks
        optimizer.zero_grad()
        step(module, batch).backward()
        optimizer.step()
    assert alive(module, pruned.plan) > 50
    with keep_masks(module, pruned.plan):
        assert alive(module, pruned.plan) == 0
        for batch in batches():
            optimizer.zero_grad()
            step(module, batch).backward()
            optimizer.step()
            assert alive(module, pruned.plan) == 0
    optimizer.zero_grad()
    step(module, batches()[0]).backward()
    optimizer.step()  # the block has ended: hooks are gone
    assert alive(module, pruned.plan) > 50


def test_gradients_are_masked_so_that_no_momentum_gathers() -> None:
    pruned = small()
    module = copy.deepcopy(pruned.module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with keep_masks(module, pruned.plan.masks):
        for batch in batches():
            optimizer.zero_grad()
            step(module, batch).backward()
            optimizer.step()
    for name, mask in pruned.plan.masks.items():
        buffer = optimizer.state[module.get_parameter(name)]["momentum_buffer"]
        assert not buffer[~torch.from_numpy(mask.kept)].any() and buffer.any()


def test_the_hook_equals_a_loop_by_hand_bit_for_bit() -> None:
    pruned = small()
    tuned = fit(
        pruned.module, batches, step, epochs=2, lr=0.05, schedule="constant", hooks=[mask_hook(pruned.plan.masks)]
    ).module
    model = copy.deepcopy(pruned.module).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        for batch in batches():
            optimizer.zero_grad()
            step(model, batch).backward()
            for name, mask in pruned.plan.masks.items():
                model.get_parameter(name).grad *= torch.from_numpy(mask.kept)
            optimizer.step()
            with torch.no_grad():
                for name, mask in pruned.plan.masks.items():
                    model.get_parameter(name).mul_(torch.from_numpy(mask.kept))
    for name, p in model.named_parameters():
        assert torch.equal(p, tuned.get_parameter(name)), name


def test_each_epoch_is_checked_with_the_layer_and_the_count() -> None:
    pruned = small()

    def revive(training: Any) -> None:
        with torch.no_grad():
            training.module.get_parameter("6.weight")[~torch.from_numpy(pruned.plan.masks["6.weight"].kept)] = 1e-30

    gone = int((~pruned.plan.masks["6.weight"].kept).sum())
    hooks = [mask_hook(pruned.plan.masks), Hook(name="saboteur", after_step=revive)]
    with pytest.raises(VerificationError, match=rf"Got {gone} of {gone} in 6\.weight alive"):
        fit(pruned.module, batches, step, epochs=2, hooks=hooks)


def _own(train: Callable[[nn.Module], nn.Module | None]) -> Pruned:
    return recover(small(), train=train, train_batches=batches, step=step)


def test_a_loop_of_ones_own_keeps_zeros_without_a_line_about_masks() -> None:
    def train(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for batch in batches():
            optimizer.zero_grad()
            step(model, batch).backward()
            optimizer.step()

    tuned = _own(train)
    assert alive(tuned.module, tuned.plan) == 0


def test_a_loop_that_revives_zeros_behind_our_back_is_refused() -> None:
    def by_hand(model: nn.Module) -> None:
        step(model, batches()[0]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)  # type: ignore[operator]

    def another(model: nn.Module) -> nn.Module:
        other = copy.deepcopy(model)
        by_hand(other)
        return other

    def replaced(model: nn.Module) -> None:
        model[6].weight = nn.Parameter(torch.randn(16, 16))  # type: ignore[index, union-attr]

    for train in (by_hand, another, replaced):
        with pytest.raises(VerificationError, match="alive"):
            _own(train)


def test_resumed_training_keeps_zeros_and_gives_the_same_bits(tmp_path: Path) -> None:
    pruned = small()
    options: dict[str, Any] = {"step": step, "lr": 0.05, "batch_norm_batches": 0}
    whole = recover(pruned, batches, epochs=3, **options)

    def stop(training: Any) -> None:
        if training.epoch == 2:
            raise KeyboardInterrupt

    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        recover(pruned, batches, epochs=3, checkpoint=path, hooks=[Hook(name="stop", after_step=stop)], **options)
    again = recover(pruned, batches, epochs=3, checkpoint=path, hooks=[Hook(name="stop")], **options)
    assert all(torch.equal(t, again.module.state_dict()[n]) for n, t in whole.module.state_dict().items())


def test_batch_norm_estimated_anew_does_not_matter() -> None:
    pruned = small()
    tuned = recover(pruned, batches, step=step, epochs=0, batch_norm_batches=4)
    assert alive(tuned.module, pruned.plan) == 0
    assert not torch.equal(tuned.module[1].running_mean, pruned.module[1].running_mean)  # type: ignore[index, union-attr]


def test_masks_of_another_model_are_refused() -> None:
    pruned = small()
    with pytest.raises(UsageError, match=r"none of that name for 0\.weight"), keep_masks(nn.Linear(2, 2), pruned.plan):
        pass
    with pytest.raises(VerificationError, match="must be in the model"):
        check_zeros(nn.Linear(2, 2), pruned.plan.masks)


def test_not_a_number_is_not_zero() -> None:
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(VerificationError, match="1 of 1 in weight"):
        check_zeros(net, {"weight": Mask.of(np.array([[True, False]]), "element")})


def test_sparse_gradients_of_an_embedding() -> None:
    net = nn.Embedding(5, 3, sparse=True)
    kept = np.ones((5, 3), dtype=bool)
    kept[2] = False
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with keep_masks(net, {"weight": Mask.of(kept, "row")}):
        net(torch.tensor([2, 3])).sum().backward()
        optimizer.step()
    assert not net.weight[2].any() and net.weight[3].any()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_modules_keep_the_zeros_of_what_they_wrap(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    kept = np.arange(12).reshape(3, 4) % 3 > 0
    wrapped = wrap(net)
    assert "0.weight" not in dict(wrapped.named_parameters())
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    with keep_masks(wrapped, {"0.weight": Mask.of(kept, "element")}):
        for p in wrapped.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert np.array_equal(net[0].weight.detach().numpy() != 0, kept)
