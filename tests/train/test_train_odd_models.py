"""Models and loaders that a training meets now and then: masks of minus infinity, more outputs in training, loaders with a generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from paredown.couple import couple
from paredown.errors import RejectedError, UsageError
from paredown.plan import Mask, Plan
from paredown.program import capture
from paredown.prune import Lottery, prune, sparsify
from paredown.score import score
from paredown.statistics.batches import apart, reseeded
from paredown.train import fit, recover
from paredown.train.batch_norm import reestimate_batch_norm


class Causal(nn.Module):
    """A saved mask of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("mask", torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))).mean(1) + self.mask.softmax(-1).sum() * 0


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, 4, generator=made), torch.randint(0, 2, (8,), generator=made)) for _ in range(count)]


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_a_buffer_of_minus_infinity_is_no_divergence_and_a_weight_is() -> None:
    net = Causal()
    trained = fit(net, batches(), step, epochs=1)
    assert [e.note for e in trained.history] == [""]
    pruned = prune(
        capture(net, batches()[0][0]),
        Plan(keep={"a.weight": {0: (0, 2, 3)}, "a.bias": {0: (0, 2, 3)}, "b.weight": {1: (0, 2, 3)}}),
    )

    def broken(model: nn.Module) -> None:
        with torch.no_grad():
            model.b.bias.fill_(float("inf"))

    assert recover(pruned, train=lambda model: None).module.b.bias.isfinite().all()
    with pytest.raises(RejectedError, match=r"infinity in b\.bias\."):
        recover(pruned, train=broken)


class Auxiliary(nn.Module):
    """A head that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.head, self.aux = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.n(self.a(x))).mean((2, 3))
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


def test_a_step_that_wants_the_outputs_of_training_gets_them_where_batch_norm_is_estimated() -> None:
    made = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 1, 5, 5, generator=made) + 2, torch.randint(0, 2, (8,), generator=made)) for _ in range(4)]

    def both(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        out, aux = model(batch[0])
        return F.cross_entropy(out, batch[1]) + 0.3 * F.cross_entropy(aux, batch[1])

    net = Auxiliary()
    found = reestimate_batch_norm(net, data, data[0][0], step=both)
    plain = reestimate_batch_norm(net, [x for x, _ in data], data[0][0])
    torch.testing.assert_close(found.n.running_mean, plain.n.running_mean)
    torch.testing.assert_close(found.n.running_var, plain.n.running_var)
    assert not torch.equal(found.n.running_mean, net.n.running_mean)
    program = capture(net, data[0][0])
    keep = {"a.weight": {0: (0, 1, 4)}, **{f"{n}": {0: (0, 1, 4)} for n in ("a.bias", "n.weight", "n.bias", "n.running_mean", "n.running_var")}, "head.weight": {1: (0, 1, 4)}, "aux.weight": {1: (0, 1, 4)}}  # fmt: skip
    small = prune(program, Plan(keep=keep))
    assert recover(small, data, step=both, epochs=1).module.n.running_mean.shape == (3,)

    def wrong(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        reestimate_batch_norm(net, data, data[0][0], step=wrong)


def test_a_loader_with_its_own_generator_continues_to_the_same_bits(tmp_path: Path) -> None:
    x = torch.randn(32, 6, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, torch.arange(32) % 2)

    def loader() -> DataLoader[Any]:
        return DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
    whole = fit(net, loader(), step, epochs=4, lr=0.1).module

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.epoch == 2 and progress.step == 1:
            raise Stop

    file = tmp_path / "c.safetensors"
    with pytest.raises(Stop):
        fit(net, loader(), step, epochs=4, lr=0.1, checkpoint=file, progress=stop)
    again = fit(net, loader(), step, epochs=4, lr=0.1, checkpoint=file).module
    assert torch.equal(whole[1].weight, again[1].weight)
    same = loader()
    orders = [[b[0][0, 0, 0].item() for b in reseeded(same, seed)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_a_pass_in_the_middle_of_another_has_its_own_iterator() -> None:
    made = DataLoader([torch.ones(2)] * 4, num_workers=1, persistent_workers=True)
    other = apart(made)
    assert other is not made and not other.persistent_workers and other.dataset is made.dataset
    plain = DataLoader([torch.ones(2)] * 4)
    assert apart(plain) is plain and apart([1]) == [1]


class Noisy(nn.Module):
    """Draws in eval, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.b(y + 0.1 * torch.randn_like(y))


def test_masks_are_proven_with_the_same_noise_on_both_sides() -> None:
    net, kept = Noisy().eval(), np.arange(24).reshape(6, 4) % 2 == 0
    program = capture(net, torch.randn(8, 4))
    state = torch.get_rng_state()
    pruned = prune(program, Plan(keep={}, masks={"a.weight": Mask.of(kept, "element")}))
    assert pruned.proof.max_error == 0.0 and pruned.proof.moved > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "taylor2", "snip", "wanda"])
def test_gradients_of_half_precision_are_not_lost(criterion: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(8, 16)
    data = [(x, torch.arange(8) % 3)]

    def small(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 1e-3 * F.cross_entropy(model(batch[0].to(next(model.parameters()).dtype)).float(), batch[1])

    found = []
    for kind in (torch.float32, torch.float16):
        own = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
        own.load_state_dict(net.state_dict())
        program = capture(own.to(kind).eval(), x.to(kind))
        scores = score(program, couple(program), criterion, batches=data, loss=small)
        found.append(np.asarray(scores.by_space["0.weight[0]"]))
    assert (found[1] > 0).all()
    np.testing.assert_allclose(found[1], found[0], rtol=0.05, atol=0.01 * found[0].max())


def test_every_training_of_one_call_tells_its_own_name(tmp_path: Path) -> None:
    """Controls of a curve are trained as long as all of them together."""
    heard: dict[str, int] = {}
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 2))
    sparsify(
        capture(net.eval(), batches()[0][0]), batches(), step=step, epochs=2, density=0.5, criterion="l1", schedule=Lottery(rounds=2),
        checkpoint=tmp_path / "level-1-training.safetensors", progress=lambda p: heard.update({p.training: p.epochs}),
    )  # fmt: skip
    assert heard == {"level-1-training": 2, "level-1-training-1": 2, "level-1-training-2": 2}


def test_a_folder_from_before_tables_stayed_whole_still_fits() -> None:
    from paredown.couple.assemble import assemble
    from paredown.couple.trace import lockstep, trace
    from paredown.prune.files import _fitting
    from paredown.prune.removal import removal

    net, x = Rotary().eval(), torch.randn(2, 6, 5)
    program = capture(net, x)
    other = lockstep(program)
    assert other is not None
    space = next(s for s in assemble(other, 0.0).spaces if any(f.parameter == "table" for f in s.footprints))
    gone = {(f.parameter, f.axis): set(f.indices[0].tolist()) for f in space.footprints}
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, axis), lost in gone.items():
        length = program.state[name].shape[axis]
        keep.setdefault(name, {})[axis] = tuple(i for i in range(length) if i not in lost)
    plan = Plan(keep=keep)
    with pytest.raises(UsageError):
        removal(trace(program), plan)
    assert _fitting(program, plan).trace is not trace(program)


class Rotary(nn.Module):
    """A saved table turns pairs of channels of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)
        self.register_buffer("table", torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (t * self.table + torch.cat([-t[..., 2:], t[..., :2]], -1) * (1 - self.table) for t in (q, k))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
