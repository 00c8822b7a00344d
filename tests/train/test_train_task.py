from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from paredown.errors import RejectedError, UsageError
from paredown.train import Metric, check_roles, content_hashes, metric_values, predictor, task_from_module
from paredown.train.roles import Remembered, check_calibration
from paredown.train.task import kept_randomness

IMAGES = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 2
METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}


def split(first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(torch.split(IMAGES[first:last], 5), torch.split(LABELS[first:last], 5), strict=True))


def evaluate(predict, batches):
    return {"accuracy": np.concatenate([100.0 * (predict(x).argmax(1) == y).numpy() for x, y in batches])}


def module(**changes: object) -> ModuleType:
    found = ModuleType("mine.task")
    functions = {
        "model": lambda: nn.Linear(3, 2),
        "inputs": lambda: IMAGES[:2],
        "train_batches": lambda: split(0, 20),
        "calibration_batches": lambda: [x for x, _ in split(20, 25)],
        "choose_batches": lambda: split(20, 30),
        "test_batches": lambda: split(30, 40),
        "step": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        "evaluate": evaluate,
        "METRIC": METRIC,
        "NORMALISATION": "none",
    }
    for name, value in {**functions, **changes}.items():
        if value is not None:
            setattr(found, name, value)
    return found


def test_a_module_becomes_a_task():
    task = task_from_module(module())
    assert (task.name, task.metric, task.normalisation) == (
        "task",
        Metric(name="accuracy", unit="%", goal="max"),
        "none",
    )
    model = task.model()
    value, each = metric_values(task.metric, task.evaluate(predictor(model)))
    assert each is not None
    right = (model(IMAGES[30:]).argmax(1) == LABELS[30:]).sum()
    assert (len(each), value) == (10, 100 * int(right) / 10)
    assert task.choose is not None
    held_out = metric_values(task.metric, task.choose(predictor(model)))[1]
    assert held_out is not None
    assert len(held_out) == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"  # type: ignore[misc]


def test_evaluate_without_batches_is_taken_as_it_is():
    task = task_from_module(module(evaluate=lambda predict: {"accuracy": 50.0}, test_batches=None))
    assert metric_values(task.metric, task.evaluate(predictor(task.model()))) == (50.0, None)
    assert task.choose is None
    with pytest.raises(UsageError, match="test_batches"):
        task_from_module(module(test_batches=None))


def test_train_may_stand_for_step():
    task = task_from_module(module(step=None, train_batches=None, train=lambda model: model))
    assert task.step is None
    assert task.train is not None


@pytest.mark.parametrize("name", ["model", "inputs", "calibration_batches", "evaluate", "step", "train_batches"])
def test_a_missing_function_is_named(name):
    with pytest.raises(UsageError, match=name):
        task_from_module(module(**{name: None}))


@pytest.mark.parametrize("given", [None, "accuracy", {"name": "mae", "unit": "g"}, {**METRIC, "goal": "higher"}])
def test_the_direction_is_never_guessed(given):
    with pytest.raises(UsageError, match=r"does not guess which"):
        task_from_module(module(METRIC=given))
    with pytest.raises(UsageError, match="does not guess"):
        Metric(name="mae", unit="g", goal="up")  # type: ignore[arg-type]


def test_better():
    assert Metric(name="a", unit="%", goal="max").better(2, 1)
    assert Metric(name="a", unit="%", goal="min").better(1, 2)
    assert not Metric(name="a", unit="%", goal="min").better(1, 1)


def test_data_is_given_to_who_asks(tmp_path):
    seen = []

    def model(data, width=2):
        seen.append(data)
        return nn.Linear(3, width)

    task = task_from_module(module(model=model), data=str(tmp_path))
    assert task.model(width=4).out_features == 4
    assert seen == [tmp_path]
    assert task.data == tmp_path
    with pytest.raises(UsageError, match="data: DIR"):
        task_from_module(module(model=model))
    with pytest.raises(UsageError, match="Leave it out"):
        task_from_module(module(), data=tmp_path)
    optional = task_from_module(module(model=lambda data=Path("here"): data))
    assert optional.model() == Path("here")


def test_calibration_batches_may_be_whole_batches():
    task = task_from_module(module(calibration_batches=lambda: split(20, 30), batch_inputs=lambda batch: batch[0]))
    assert torch.equal(next(iter(task.calibration_batches())), IMAGES[20:25])
    assert check_roles(task).num_calibration == 10
    with pytest.raises(RejectedError, match="batch_inputs"):
        check_roles(task_from_module(module(calibration_batches=lambda: split(20, 30))))


# ---------------------------------------------------------------------------------------------------------- the metric


@pytest.mark.parametrize(
    "value", [3, 3.0, np.float32(3), torch.tensor(3.0), np.array([2.0, 4.0]), [2, 4], torch.tensor([2, 4])]
)
def test_numbers_are_taken(value):
    assert metric_values(Metric(name="m", unit="", goal="min"), {"m": value})[0] == 3.0


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        ({"m": None}, UsageError, "None"),
        ({"m": "3"}, UsageError, "'3'"),
        ({"m": True}, UsageError, "bool"),
        ({"m": np.zeros((2, 2))}, UsageError, r"\(2, 2\)"),
        ({"m": float("nan")}, RejectedError, "NaN"),
        ({"m": [1.0, float("inf")]}, RejectedError, "1 of 2"),
        ({"m": []}, RejectedError, "no samples"),
        ({"other": 1.0}, UsageError, "other"),
        (3.0, UsageError, "float"),
    ],
)
def test_what_is_no_number_is_refused(result, error, match):
    with pytest.raises(error, match=match):
        metric_values(Metric(name="m", unit="", goal="min"), result)


def test_a_predictor_is_float32_on_the_cpu_and_puts_the_mode_back():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9)).double().train()
    model[1].eval()
    predict = predictor(model)
    a = predict(IMAGES.double())
    assert (a.dtype, a.requires_grad) == (torch.float32, False)
    assert torch.equal(a, model[0](IMAGES.double()).detach().float())
    assert [m.training for m in model.modules()] == [True, True, False]


# ----------------------------------------------------------------------------------------------------------- data roles


def test_roles_are_counted():
    roles = check_roles(task_from_module(module()))
    assert (roles.num_train, roles.num_calibration, roles.num_choose, roles.num_test) == (20, 5, 10, 10)
    assert roles.warnings == ()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda x, y: list(zip(x.split(3), y.split(3), strict=True)), True),  # other batches of the same
        (lambda x, y: [(x[i], y[i]) for i in (slice(0, 5), slice(5, 10))], True),
        (lambda x, y: [(x.flip(0), y.flip(0))], False),  # another order
        (lambda x, y: [(x, 1 - y)], False),  # another truth
        (lambda x, y: [(x, y), (x[:1], y[:1])], False),  # one of them twice
        (lambda x, y: [(x[:9], y[:9])], False),
    ],
)
def test_the_digest_of_test_data_knows_order_truth_and_repeats(change, same):
    first, other = (
        check_roles(task_from_module(module(test_batches=lambda made=made: made))).test_digest
        for made in ([(IMAGES[30:40], LABELS[30:40])], change(IMAGES[30:40], LABELS[30:40]))
    )
    assert len(first) == 64 and (first == other) is same


def test_the_digest_takes_batches_of_any_structure():
    boxes = [torch.zeros(0, 4), torch.ones(2, 4)]
    for name, truth, other in (
        ("mapping", {"y": LABELS[:2]}, {"y": 1 - LABELS[:2]}),
        ("ragged", boxes, [boxes[1], boxes[0]]),
        ("number", torch.tensor(1.0), torch.tensor(2.0)),
        ("numpy", LABELS[:2].numpy(), 1 - LABELS[:2].numpy()),
    ):
        found = {
            check_roles(task_from_module(module(test_batches=lambda t=t: [(IMAGES[30:32], t)]))).test_digest
            for t in (truth, other, truth)
        }
        assert len(found) == 2, name


def test_calibration_on_test_samples_is_refused():
    with pytest.raises(RejectedError, match=r"calibration_batches .* Got 3 of 8 samples"):
        check_roles(task_from_module(module(calibration_batches=lambda: [IMAGES[25:33]])))
    with pytest.raises(RejectedError, match=r"choose_batches .* Got 1 of 11"):
        check_roles(task_from_module(module(choose_batches=lambda: split(20, 31))))


def test_fault_49_an_evaluation_of_its_own_data_is_compared_when_it_has_run():
    def own(predict):
        return {"accuracy": 100.0 * float((predict(IMAGES[28:40]).argmax(1) == LABELS[28:40]).float().mean())}

    task = task_from_module(module(evaluate=own, test_batches=None, train_batches=lambda: split(0, 20) + split(35, 40)))
    roles = check_roles(task)
    assert roles.warnings == ()
    seen = Remembered(predictor(task.model()))
    task.evaluate(seen)
    with pytest.raises(RejectedError, match=r"choose_batches .* Got 2 of 10 samples"):
        roles.beside(seen)
    apart = dataclasses.replace(roles, samples={**roles.samples, "choose_batches": None}).beside(seen)
    assert apart.warnings == ("5 of 12 test samples are also training samples: the test figures are too good.",)
    with pytest.raises(RejectedError, match=r"calibration_batches .* Got 1 of 4 samples"):
        check_roles(
            task_from_module(module(evaluate=own, test_batches=None, calibration_batches=lambda: [IMAGES[25:29]]))
        ).beside(seen)


def test_fault_49_calibration_alone_is_compared_with_what_the_metric_is_read_on():
    task = task_from_module(module())
    assert check_calibration(task, lambda: [IMAGES[:5]]) == ()
    (said,) = check_calibration(task, lambda: [IMAGES[15:25]])
    assert said == "5 of 10 held-out samples are also calibration samples: the held-out figures are too good."
    with pytest.raises(RejectedError, match=r"--calibrate .* test_batches. Got 2 of 4 samples"):
        check_calibration(task, lambda: [IMAGES[28:32]], name="--calibrate")
    assert check_calibration(task, lambda: [IMAGES[28:32]], calibrates=False) == ()
    task = task_from_module(module(train_batches=lambda: split(0, 20) + split(28, 30)))
    assert check_calibration(task, lambda: [IMAGES[:5]]) == ()
    (said,) = check_calibration(task, lambda: [IMAGES[:5]], trains=True)
    assert said == "2 of 10 held-out samples are also training samples: the held-out figures are too good."
    with pytest.raises(RejectedError, match="choose_batches must yield"):
        check_calibration(task_from_module(module(choose_batches=list)), lambda: [IMAGES[:5]], calibrates=False)


@pytest.mark.parametrize(
    ("batch", "got"), [(IMAGES[20:25].double(), "float64 [·, 3]"), (IMAGES[20:25, :2], "float32 [·, 2]")]
)
def test_calibration_batches_are_of_the_kind_of_the_inputs(batch, got):
    with pytest.raises(RejectedError, match=re.escape(f"inputs(): float32 [·, 3]. Got {got}.")):
        check_roles(task_from_module(module(calibration_batches=lambda: [batch])))


def test_training_on_test_samples_is_a_warning():
    roles = check_roles(task_from_module(module(train_batches=lambda: split(0, 20) + split(38, 40))))
    assert roles.warnings == ("2 of 10 test samples are also training samples: the test figures are too good.",)


def test_endless_loaders_are_named_and_hang_nothing(monkeypatch):
    def endless():
        while True:
            yield IMAGES[:4], torch.zeros(4)

    monkeypatch.setattr("paredown.train.roles.TRAIN_SECONDS", 0.05)
    (said,) = check_roles(task_from_module(module(train_batches=endless))).warnings
    assert "recover.max_steps" in said
    monkeypatch.setattr("paredown.train.roles.TRAIN_SECONDS", 600.0)
    monkeypatch.setattr("paredown.train.roles.MOST_BATCHES", 50)  # a fast loader comes there first
    (said,) = check_roles(task_from_module(module(train_batches=endless))).warnings
    assert "50 batches" in said and "recover.max_steps" in said
    with pytest.raises(RejectedError, match="calibration_batches must end"):
        check_roles(task_from_module(module(calibration_batches=lambda: (x for x, _ in endless()))))


@pytest.mark.parametrize("name", ["calibration_batches", "test_batches", "choose_batches", "train_batches"])
@pytest.mark.parametrize("empty", [[], [(torch.zeros(0, 3), torch.zeros(0))]])
def test_an_empty_role_is_refused(name, empty):
    if name == "calibration_batches":
        empty = [batch[0] for batch in empty]
    with pytest.raises(RejectedError, match=name):
        check_roles(task_from_module(module(**{name: lambda: empty})))


def test_hashes_are_of_samples_not_of_batches():
    a = content_hashes(split(0, 20))
    order = torch.randperm(20)
    assert content_hashes([IMAGES[:20][order]]) == a
    assert len(a) == 20
    assert content_hashes([{"args": (IMAGES[:1].numpy(),), "kwargs": {}}]) < a
    assert content_hashes([IMAGES[:1].double()]).isdisjoint(a)
    row = IMAGES[:1].numpy().tobytes()
    assert content_hashes([IMAGES[:1]]) == {hashlib.blake2b(b"torch.float32(3,)" + row, digest_size=16).digest()}
    with pytest.raises(RejectedError, match="hold a tensor"):
        content_hashes([("text",)])


def test_checking_leaves_the_random_states_alone():
    def noisy():
        random.random(), np.random.rand()  # noqa: NPY002
        return [(IMAGES[:20] + torch.randn(20, 3), LABELS[:20])]

    with kept_randomness():
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        expected = torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        check_roles(task_from_module(module(train_batches=noisy)))
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected  # noqa: NPY002


def pairs(start, stop):
    """Users and items as numbers: every user and every item is in each role, no pair is in two."""
    numbers = torch.arange(start, stop)
    return [(numbers % 7, numbers // 7, numbers.float())]


class Rating(nn.Module):
    def forward(self, user, item):
        return (user + item).float()


def test_samples_of_several_inputs_are_the_same_where_all_of_them_are():
    def rated(**more):
        return module(
            model=Rating,
            inputs=lambda: (torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)),
            train_batches=lambda: pairs(0, 70),
            calibration_batches=lambda: [b[:2] for b in pairs(0, 35)],
            choose_batches=lambda: pairs(70, 84),
            test_batches=lambda: pairs(84, 105),
            **more,
        )

    roles = check_roles(task_from_module(rated()))
    assert (roles.num_train, roles.num_calibration, roles.num_choose, roles.num_test) == (70, 35, 14, 21)
    assert roles.warnings == ()
    leaking = rated()
    leaking.calibration_batches = lambda: [b[:2] for b in pairs(90, 110)]
    with pytest.raises(RejectedError, match=r"Got 15 of 20 samples that are also test samples"):
        check_roles(task_from_module(leaking))


def test_inputs_are_found_by_their_names_wherever_targets_stand():
    like = {"args": (), "kwargs": {"ids": torch.zeros(2, 4), "mask": torch.zeros(2, 4)}}
    ids, mask, labels = torch.arange(12.0).reshape(3, 4), torch.ones(3, 4), torch.zeros(3)
    named = content_hashes([{"labels": labels, "mask": mask, "ids": ids}], like=like)
    assert len(named) == 3
    given = {"args": (), "kwargs": {"ids": ids, "mask": mask}}
    assert named == content_hashes([given], like=like) == content_hashes([(ids, mask, labels)], like=like)
    seen = Remembered(lambda **_: None)
    seen(mask=mask, ids=ids)
    assert seen.samples == named


def test_samples_that_are_alike_by_chance_are_told_and_not_refused():
    few = torch.arange(24.0).reshape(8, 3)

    def drawn(seed, count):
        picks = torch.randint(8, (count,), generator=torch.Generator().manual_seed(seed))
        return [(few[picks], LABELS[:1].repeat(count))]

    made = module(
        train_batches=lambda: drawn(0, 90), calibration_batches=lambda: [drawn(1, 40)[0][0]],
        choose_batches=lambda: drawn(2, 30), test_batches=lambda: drawn(3, 50),
    )  # fmt: skip
    roles = check_roles(task_from_module(made))
    assert any("8 of 8 distinct samples of calibration_batches are in test_batches too" in w for w in roles.warnings)
    assert any("8 of 50 test samples are distinct" in w for w in roles.warnings)
