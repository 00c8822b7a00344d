from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from paredown.errors import RejectedError, UsageError
from paredown.program import GraphModel, capture
from paredown.recipes import cifar10
from paredown.train import metric_values, predictor, recover, reestimate_batch_norm, task_from_module
from paredown.train.checkpoint import state_digest

DATA = Path(__file__).parents[2].parent / "shared" / "data"


class Net(nn.Module):
    """A norm used twice, a norm behind dropout, a keyword input, a norm without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.mix = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)
        self.last = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        y = self.norm(self.mix(self.norm(self.conv(x * scale))))
        y = self.bare(y).square().mean((2, 3))
        return self.linear(self.drop(self.last(y)))


def made() -> Net:
    torch.manual_seed(0)
    return Net().eval()


SCALE = torch.full((1,), 2.0)
BATCHES = [
    (torch.randn(n, 1, 5, 5, generator=torch.Generator().manual_seed(n)) + 1, torch.zeros(n, dtype=torch.long))
    for n in (8, 6, 3)
]
EXAMPLE = {"args": (BATCHES[0][0],), "kwargs": {"scale": SCALE}}


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0], scale=SCALE), batch[1])


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {n: b for n, b in module.named_buffers() if "running" in n}


def by_hand(module: Net) -> dict[str, Tensor]:
    """Each batch's own statistics of the inputs of each norm, by hooks; averaged over uses, then over samples."""
    module = copy.deepcopy(module).eval()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in ("norm", "last"):

        def note(norm, args, _output, name=name):
            axes = (0, 2, 3) if args[0].dim() == 4 else (0,)
            seen.setdefault(name, []).append((args[0].mean(axes), args[0].var(axes, unbiased=True)))

        norm = getattr(module, name)
        norm.train()
        norm.momentum = 0.0  # hooks only look; the buffers stay
        norm.register_forward_hook(note)
    total: dict[str, Tensor] = {}
    with torch.no_grad():
        for x, _ in BATCHES:
            seen.clear()
            module(x, scale=SCALE)
            for name, uses in seen.items():
                for kind, values in zip(("running_mean", "running_var"), zip(*uses, strict=True), strict=True):
                    part = len(x) / 17 * torch.stack(values).mean(0)
                    total[f"{name}.{kind}"] = total.get(f"{name}.{kind}", torch.zeros(())) + part
    return total


@pytest.mark.parametrize("form", ["module", "graph"])
def test_statistics_are_those_of_the_batches(form):
    module: nn.Module = made()
    expected = by_hand(made())
    assert len(expected) == 4
    if form == "graph":
        program = capture(module, EXAMPLE)
        module = GraphModel(program.eval_graph, program.train_graph, program.state)
    before = state_digest(module)
    new = reestimate_batch_norm(module, lambda: BATCHES, EXAMPLE, step=step)
    assert state_digest(module) == before
    assert type(new).__name__ == type(module).__name__
    for name, tensor in statistics(new).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert float((tensor - dict(module.named_buffers())[name]).abs().max()) > 1e-2
    for name, parameter in new.named_parameters():
        assert torch.equal(parameter, dict(module.named_parameters())[name])
    assert all(int(b) == 0 for n, b in new.named_buffers() if "tracked" in n)
    assert not any(m.training for m in new.modules())


def test_agrees_with_torchs_update_bn():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
    data = [torch.randn(8, 1, 6, 6) * k for k in (1.0, 2.0, 3.0)]
    oracle = copy.deepcopy(module)
    update_bn(data, oracle)
    new = reestimate_batch_norm(module, lambda: data, data[0])
    for name, tensor in statistics(new).items():
        torch.testing.assert_close(tensor, statistics(oracle)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_num_batches_and_lone_last_batches():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    data = [torch.randn(8, 2), torch.randn(8, 2), torch.randn(1, 2)]
    two = reestimate_batch_norm(module, lambda: data[:2], data[0])
    assert state_digest(reestimate_batch_norm(module, lambda: data, data[0])) == state_digest(two)
    one = reestimate_batch_norm(module, lambda: data, data[0], num_batches=1)
    assert state_digest(one) != state_digest(two)


def test_the_same_seed_draws_the_same_augmentation():
    module, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), torch.randn(8, 2)

    def noisy():
        yield x + torch.randn(8, 2)

    runs = [state_digest(reestimate_batch_norm(module, noisy, x, seed=s)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_model_without_batch_norm_comes_back_equal():
    module = nn.Linear(2, 2)
    new = reestimate_batch_norm(module, list, torch.zeros(1, 2))
    assert new is not module
    assert state_digest(new) == state_digest(module)


@pytest.mark.parametrize(("data", "match"), [([], "at least one batch"), ([torch.full((4, 2), torch.nan)], "finite")])
def test_batches_that_say_nothing(data, match):
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(RejectedError, match=match):
        reestimate_batch_norm(module, lambda: data, torch.zeros(4, 2))


# ------------------------------------------------------------------------------------------------------------- recover


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    module: nn.Module
    program: object
    note: str = "kept"


def small() -> Small:
    return Small(module=made(), program=SimpleNamespace(inputs=((EXAMPLE["args"][0],), {"scale": SCALE})))


def test_recover_without_epochs_is_batch_norm_alone():
    given = small()
    tuned = recover(given, lambda: BATCHES, step=step, epochs=0)
    assert state_digest(tuned.module) == state_digest(
        reestimate_batch_norm(given.module, lambda: BATCHES, EXAMPLE, step=step)
    )
    assert state_digest(given.module) == state_digest(made())
    assert (tuned.note, type(tuned)) == ("kept", Small)


def test_recover_re_estimates_after_training():
    options = {"epochs": 2, "seed": 3}
    tuned = recover(small(), lambda: BATCHES, step=step, **options)
    raw = recover(small(), lambda: BATCHES, step=step, **options, batch_norm_batches=0)
    expected = reestimate_batch_norm(raw.module, lambda: BATCHES, EXAMPLE, step=step)
    assert state_digest(tuned.module) == state_digest(expected) != state_digest(raw.module)


def test_recover_trains_and_distils():
    given = small()
    tuned = recover(given, lambda: BATCHES, step=step, epochs=2, teacher=made(), batch_norm_batches=2)
    assert not torch.equal(tuned.module.linear.weight, given.module.linear.weight)
    assert state_digest(given.module) == state_digest(made())


def test_recover_by_the_users_own_loop():
    def own(model):
        assert model.training
        with torch.no_grad():
            model.linear.weight.zero_()

    given = small()
    for train in (own, lambda m: (own(m), m)[1]):
        tuned = recover(given, train=train)
        assert not tuned.module.training
        assert float(tuned.module.linear.weight.detach().abs().max()) == 0
    assert state_digest(given.module) == state_digest(made())
    tuned = recover(given, lambda: BATCHES, step=step, train=own)  # batch norm is re-estimated after it
    assert not torch.equal(tuned.module.norm.running_mean, given.module.norm.running_mean)


def nan_weights(model):
    with torch.no_grad():
        model.linear.weight.fill_(torch.nan)


@pytest.mark.parametrize(
    ("train", "error", "match"),
    [
        (lambda m: 3, UsageError, "return the model"),
        (lambda m: nn.Linear(2, 2), RejectedError, "structure"),
        (nan_weights, RejectedError, "linear.weight"),
    ],
)
def test_what_the_users_own_loop_must_give_back(train, error, match):
    with pytest.raises(error, match=match):
        recover(small(), train=train)


@pytest.mark.parametrize("options", [{}, {"step": step}])
def test_recover_needs_one_way_to_train(options):
    with pytest.raises(UsageError, match="recover must be given"):
        recover(small(), **options)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10.npz").exists(), reason="no shared data here")
def test_resnet20_keeps_its_accuracy_on_augmented_images_and_loses_it_on_plain_ones():
    task = task_from_module(cifar10, data=DATA)
    model = task.model()
    (images, labels), _ = cifar10._train_split(DATA)

    def plain():
        return cifar10._Batches(images=images, labels=labels, batch=128, augmented=False)

    def accuracy(batches):
        new = reestimate_batch_norm(model, batches, task.inputs(), step=task.step, num_batches=60)
        return metric_values(task.metric, task.evaluate(predictor(new)))[0]

    assert accuracy(task.train_batches) > 91.3
    assert accuracy(plain) < 90.0
