from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from paredown.errors import RejectedError, UsageError
from paredown.train import fit
from paredown.train.checkpoint import state_digest
from paredown.train.distil import Teacher, distil_kl

CPU = torch.device("cpu")


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in row]
    return [p / sum(powers) for p in powers]


def test_kl_by_hand():
    student, teacher, temperature = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], [[2.0, 0.0, 0.0], [1.0, 1.0, -4.0]], 4.0
    rows = [
        sum(t * math.log(t / s) for s, t in zip(softmax(a, temperature), softmax(b, temperature), strict=True))
        for a, b in zip(student, teacher, strict=True)
    ]
    expected = 16 * sum(rows) / 2
    assert float(distil_kl(torch.tensor(student), torch.tensor(teacher), temperature)) == pytest.approx(
        expected, rel=1e-5
    )
    assert expected > 0.1


@pytest.mark.parametrize(("shape", "axis"), [((5, 7), 1), ((2, 5, 7), 2), ((2, 7, 3, 4), 1)])
def test_kl_takes_the_class_axis_and_torchs_own_agrees(shape, axis):
    torch.manual_seed(0)
    s, t = torch.randn(shape), torch.randn(shape)
    rows_s, rows_t = (z.movedim(axis, -1).reshape(-1, 7) for z in (s, t))
    expected = nn.functional.kl_div(
        (rows_s / 2).log_softmax(1), (rows_t / 2).log_softmax(1), reduction="batchmean", log_target=True
    )  # fmt: skip
    assert float(distil_kl(s, t, 2.0)) == pytest.approx(4 * float(expected), rel=1e-5)


def test_the_gradient_keeps_its_size_over_temperatures():
    teacher = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)) * 0.1
    sizes = []
    for temperature in (4.0, 40.0):
        student = torch.zeros(4, 10, requires_grad=True)
        (grad,) = torch.autograd.grad(distil_kl(student, teacher, temperature), student)
        sizes.append(float(grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


class InPlace(nn.Module):
    """Changes its own input, as nn.ReLU(inplace=True) on it would."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.linear(x.mul_(0).add_(scale))


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.scales: list[float] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.seen.append(x.clone())
        self.scales.append(scale)
        return x[:, :2]


def test_the_teacher_sees_the_inputs_as_they_were():
    student = InPlace().train()
    listening = Teacher(Keeps(), student, CPU, kind="mse", temperature=1.0)
    x = torch.arange(6.0).reshape(2, 3)
    student(x.clone(), scale=2.0)
    listening.loss()
    inner = listening._model
    assert torch.equal(inner.seen[0], x)
    assert inner.scales == [2.0]


def test_several_calls_are_averaged_and_forgotten_after():
    student = nn.Linear(2, 3).train()
    teacher = nn.Linear(2, 3)
    listening = Teacher(teacher, student, CPU, kind="mse", temperature=1.0)
    a, b = torch.randn(4, 2), torch.randn(4, 2)
    student(a), student(b)
    each = [nn.functional.mse_loss(student.forward(x), teacher(x)) for x in (a, b)]
    assert listening.loss().item() == pytest.approx((each[0] + each[1]).item() / 2, rel=1e-6)
    with pytest.raises(UsageError, match="must call model"):
        listening.loss()
    listening.detach()
    student(a)
    with pytest.raises(UsageError):
        listening.loss()


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    ids: Tensor


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        y = self.linear(x)
        parts = {"logits": y, "hidden": (y * 2,), "ids": torch.arange(3)}
        return Output(**parts) if self.kind == "dataclass" else parts


@pytest.mark.parametrize("kind", ["dataclass", "dict"])
def test_structures(kind):
    student, teacher, x = Structured(kind).train(), Structured(kind), torch.randn(5, 2)
    gap = student.linear(x) - teacher.linear(x)
    for loss, expected in (
        ("mse", 2.5 * gap.square().mean()),
        ("kl", distil_kl(student.linear(x), teacher.linear(x), 4.0)),
    ):
        listening = Teacher(teacher, student, CPU, kind=loss, temperature=4.0)
        student(x)
        assert float(listening.loss()) == pytest.approx(float(expected), rel=1e-4)
        listening.detach()


def test_outputs_that_do_not_match_are_refused():
    student = nn.Linear(2, 3).train()
    for kind, teacher, error in (("kl", nn.Linear(2, 4), RejectedError), ("mse", nn.Linear(2, 1), RejectedError)):
        listening = Teacher(teacher, student, CPU, kind=kind, temperature=4.0)
        student(torch.zeros(1, 2))
        with pytest.raises(error, match="one structure"):
            listening.loss()
        listening.detach()
    single = nn.Linear(2, 1).train()
    listening = Teacher(nn.Linear(2, 1), single, CPU, kind="kl", temperature=4.0)
    single(torch.zeros(1, 2))
    with pytest.raises(UsageError, match="distil: mse"):
        listening.loss()


def test_fit_mixes_the_losses_and_leaves_the_teacher_alone():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    student = nn.Linear(4, 3)
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    before = state_digest(teacher)

    def step(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    first = fit(student, lambda: [(x, y)], step, epochs=1, teacher=teacher, distil="kl", distil_weight=0.75)
    assert state_digest(teacher) == before
    assert all(m.training for m in teacher.modules())
    teacher.eval()
    with torch.no_grad():
        expected = 0.25 * step(student, (x, y)) + 0.75 * distil_kl(student(x), teacher(x), 4.0)
    assert first.history[0].loss == pytest.approx(float(expected), rel=1e-5)


def test_distillation_alone_reaches_the_teacher():
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(64, 4)

    def gap(model):
        return float((model(x).softmax(1) - teacher(x).softmax(1)).abs().max().detach())

    fitted = fit(
        student, lambda: [x] * 20, lambda m, b: m(b).sum() * 0, epochs=10, lr=0.5, weight_decay=0.0, teacher=teacher,
        distil="kl", distil_weight=1.0, temperature=1.0,
    )  # fmt: skip
    assert gap(student) > 0.1
    assert gap(fitted.module) < 0.01


class Blocks(nn.Module):
    """Two blocks with an in-place op behind each; `inner` channels inside."""

    def __init__(self, inner: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, inner), nn.Tanh(), nn.Linear(inner, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).relu_()
        return self.head(x)


def test_layers_by_hand():
    torch.manual_seed(0)
    student, teacher, x = Blocks(3).train(), Blocks(), torch.randn(5, 4)
    listening = Teacher(teacher, student, CPU, kind="mse", temperature=1.0, layers=["blocks.?"], layers_weight=2.0)
    with torch.no_grad():
        student.eval()(x)  # not in training: not a call to learn from
        student.train()
    first, second = student(x), student(2 * x)
    found = listening.loss()
    expected = []
    for given, output in ((x, first), (2 * x, second)):
        here, there, shares = given, given, []
        for mine, theirs in zip(student.blocks, teacher.blocks, strict=True):
            a, b = mine(here), theirs(there)
            shares.append(((a - b) ** 2).sum() / (b**2).sum())
            here, there = a.relu(), b.relu()
        expected.append(((output - teacher.head(there)) ** 2).mean() + 2.0 * (shares[0] + shares[1]) / 2)
    assert float(found) == pytest.approx(float(expected[0] + expected[1]) / 2, rel=1e-5)
    (grad,) = torch.autograd.grad(found, student.blocks[0][0].weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected[0] / 2 + expected[1] / 2, student.blocks[0][0].weight)
    assert torch.allclose(grad, wanted, rtol=1e-4, atol=1e-6)
    listening.detach()
    assert not any(m._forward_hooks for m in student.modules())


def test_layers_come_nearer_and_a_checkpoint_knows_them(tmp_path):
    torch.manual_seed(0)
    teacher, student = Blocks(), Blocks(5)
    x = torch.randn(64, 4)

    def trained(**options):
        torch.manual_seed(1)
        return fit(
            student, lambda: [x] * 10, lambda m, b: m(b).sum() * 0, epochs=8, lr=0.02, teacher=teacher, distil="mse",
            distil_weight=1.0, **options,
        ).module  # fmt: skip

    def far(model):
        with torch.no_grad():
            return float((model.blocks[0](x) - teacher.blocks[0](x)).square().mean())

    asked = {"distil_layers": ["blocks.?"], "distil_layers_weight": 2.0}
    assert far(trained(**asked)) < 0.5 * far(trained())
    trained(**asked, checkpoint=tmp_path / "c.safetensors")
    again = trained(**asked, checkpoint=tmp_path / "c.safetensors")  # read from the checkpoint
    assert torch.equal(again.head.weight, trained(**asked).head.weight)
    with pytest.raises(UsageError, match="distil_layers"):
        trained(checkpoint=tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"distil_layers": ["block.*"]}, UsageError, "block\\.\\*.* matches none"),
        ({"distil_layers": "block.*"}, UsageError, r"'block\.\*', which matches none"),
        ({"distil_layers": ["blocks.0.0"]}, RejectedError, r"\(64, 3\).*\(64, 6\).*blocks\.0\.0"),
        ({"distil_layers": ["blocks"]}, UsageError, r"modules that a call of the model calls.*blocks"),
        ({"distil_layers": ["head"], "distil": "none"}, UsageError, "must come with a teacher"),
        ({"distil_layers": ["head"], "distil_layers_weight": -1.0}, UsageError, "distil_layers_weight"),
    ],
)
def test_layers_that_cannot_teach(options, error, says):
    given = {"teacher": Blocks(), "distil": "mse", **options}
    with pytest.raises(error, match=says):
        fit(Blocks(3), lambda: [torch.randn(64, 4)], lambda m, b: m(b).sum(), epochs=1, **given)


def test_a_distillation_in_grams_that_goes_astray_is_told_its_unit():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    nn.init.constant_(teacher[1].bias, 3e6)
    x = torch.randn(64, 4)
    with pytest.raises(RejectedError, match=r"must stay finite.*square of the outputs' own unit"):
        fit(
            nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)), lambda: [x] * 20, lambda m, b: m(b).sum() * 0, epochs=3, lr=10.0,
            teacher=teacher, distil="mse", distil_weight=1.0,
        )  # fmt: skip


def test_a_teacher_with_torchs_own_masks_teaches():
    """Its masked weight is the result of a computation, which copy.deepcopy refuses once the model has run."""
    from torch.nn.utils import prune

    torch.manual_seed(0)
    x = torch.randn(8, 4)
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    prune.l1_unstructured(teacher, "weight", 0.5)
    wanted = teacher(x)
    before = state_digest(teacher)
    listening = Teacher(teacher, student, CPU, kind="mse", temperature=1.0)
    output = student(x)
    assert float(listening.loss()) == pytest.approx(float((output - wanted).square().mean()), rel=1e-5)
    assert state_digest(teacher) == before
    fit(teacher, lambda: [x], lambda model, batch: model(batch).square().mean(), epochs=1, lr=0.01)
