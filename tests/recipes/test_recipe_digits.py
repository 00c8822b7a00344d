from __future__ import annotations

import pytest
import torch

from paredown.errors import GateError, UsageError
from paredown.recipes import digits
from paredown.train import check_roles, metric_values, predictor, task_from_module
from paredown.train.checkpoint import state_digest

pytest.importorskip("sklearn")


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_the_roles_are_apart_and_balanced():
    roles = check_roles(task_from_module(digits))
    assert (roles.num_calibration, roles.num_choose, roles.num_test) == (240, 240, 540)
    assert roles.warnings == ()
    labels = torch.cat([y for _, y in digits.test_batches()])
    assert torch.bincount(labels).tolist() == [54] * 10
    x = torch.cat([x for x, _ in digits.test_batches()])
    assert (x.dtype, float(x.min()), float(x.max())) == (torch.float32, 0.0, 1.0)
    assert len(digits._data().train.labels) == 1797 - 540 - 240


def test_an_epoch_is_all_training_images_augmented():
    torch.manual_seed(0)
    batches = digits.train_batches()
    seen = list(batches)
    assert len(seen) == len(batches)
    images, labels = torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])
    assert torch.equal(torch.bincount(labels), torch.bincount(digits._data().train.labels))
    assert images.shape == (1017, 1, 8, 8)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1 + 1e-6
    torch.manual_seed(0)
    assert torch.equal(next(iter(digits.train_batches()))[0], seen[0][0])
    assert not torch.equal(next(iter(digits.train_batches()))[0], seen[0][0])


def test_the_augmentation_is_the_identity_at_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, 0.5))
    x = digits.inputs()
    torch.testing.assert_close(digits._augment(x), x)


def test_a_shift_moves_by_one_pixel(monkeypatch):
    draws = torch.tensor([0.5, 0.5, 1.0, 0.5])[:, None]
    monkeypatch.setattr(torch, "rand", lambda *shape: draws.expand(shape))
    x = digits.inputs()
    torch.testing.assert_close(digits._augment(x)[..., :-1], x[..., 1:])


def test_the_ladder_holds_its_bound():
    sizes = [num_parameters(digits.model(width)) for width in digits.LADDER]
    assert sizes == sorted(sizes)
    assert sizes[0] == 77_290
    assert sizes[-1] <= 300_000


def test_the_base_reaches_its_target_and_repeats_bit_for_bit(tmp_path):
    task = task_from_module(digits)
    path = tmp_path / "base.safetensors"
    trained = task.base(seed=0, epochs=6, checkpoint=path)
    assert (tmp_path / "base-32.safetensors").exists()
    assert num_parameters(trained) == 77_290
    assert metric_values(task.metric, task.choose(predictor(trained)))[0] >= 98
    assert metric_values(task.metric, task.evaluate(predictor(trained)))[0] > 95
    assert state_digest(task.base(seed=0, epochs=6)) == state_digest(trained)


def test_the_ladder_climbs_and_gives_up_honestly(monkeypatch):
    monkeypatch.setattr(digits, "LADDER", (4, 5))
    with pytest.raises(GateError, match=r"width 4: .* width 5: "):
        digits.base(epochs=1)
    monkeypatch.setattr(digits, "LADDER", (4, 32))
    assert num_parameters(digits.base(epochs=5, seed=1)) == 77_290


@pytest.mark.parametrize("parameters", [77_290, 25_000, 20_111, 9_000])
def test_the_twin_has_the_size_it_is_asked_for(parameters):
    twin = digits.twin(parameters, epochs=0)
    assert num_parameters(twin) == pytest.approx(parameters, rel=0.015)


def test_a_twin_that_cannot_be(monkeypatch):
    with pytest.raises(UsageError, match="within 10 %"):
        digits.twin(100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_base_in_full(seed):
    task = task_from_module(digits)
    trained = task.base(seed=seed)
    assert metric_values(task.metric, task.choose(predictor(trained)))[0] >= 98
    assert metric_values(task.metric, task.evaluate(predictor(trained)))[0] >= 98
