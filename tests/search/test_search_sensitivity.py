"""Sensitivities against nets that were really cut, by hand; stopped, resumed, crashed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hazards import HAZARDS, built
from oracle import captured, distance, run, scale, zeroed
from paredown.allocate import Sensitivity, allocate
from paredown.budget import Budget
from paredown.couple import Coupling, couple
from paredown.errors import Interrupted, NothingToDo, RejectedError, UsageError
from paredown.examine import examine
from paredown.granularity import Granularity
from paredown.program import GraphModel, Program, capture
from paredown.prune import prune
from paredown.score import Scores, score
from paredown.search import Measuring, sensitivity
from paredown.search.masked import Copy
from paredown.train.batch_norm import reestimate_batch_norm
from paredown.train.task import Metric

CPU = torch.device("cpu")


class Net(nn.Module):
    """A residual stream with batch norm, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.a(x)))
        return self.fc((x + self.c(F.relu(self.b(x)))).mean((2, 3)))


Parts = tuple[Program, Coupling, Scores]


@functools.cache
def parts() -> Parts:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr,operator]
        net.norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
    program = capture(net, torch.zeros(2, 3, 6, 6))
    coupling = couple(program)
    return program, coupling, score(program, coupling)


@functools.cache
def data() -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        (torch.randn(n, 3, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator)) for n in (8, 8, 3)
    )


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def measure(**options: Any) -> Sensitivity:
    given: dict[str, Any] = {"batches": data, "loss": loss, "amounts": (0.5, 0.25)}
    program, coupling, scores = options.pop("parts", parts())
    return sensitivity(program, coupling, scores, **{**given, **options})


def mean_loss(module: nn.Module) -> float:
    with torch.no_grad():
        return sum(len(x) * float(loss(module.eval(), (x, y))) for x, y in data()) / sum(len(x) for x, _ in data())


# -------------------------------------------------------------------------------------------- the numbers are the right


def test_every_point_is_the_loss_of_the_net_with_those_units_cut_out() -> None:
    program, coupling, scores = parts()
    seen = measure()
    assert seen.dense == pytest.approx(mean_loss(program.module))
    assert seen.num_samples == 19
    assert {n: list(p) for n, p in seen.increase.items()} == {
        s.name: [len(s) // 2, len(s) // 4] for s in coupling.spaces
    }
    moved = 0.0
    for space in coupling.spaces:
        for kept, increase in seen.increase[space.name].items():
            plan = allocate(
                coupling, scores, examine(program), Budget(channels=kept), align=1, floor=0.0, include=[space.name.replace("[", "[[]")]
            )  # fmt: skip
            small = prune(program, plan).module
            assert increase == pytest.approx(mean_loss(small) - mean_loss(program.module), abs=1e-6)
            moved = max(moved, abs(mean_loss(small) - mean_loss(program.module)))
    assert moved > 5e-3


NAMES = sorted(HAZARDS)
EVERYDAY = {*NAMES[::9], *(n for n in NAMES if n.endswith(("norm", "norms", "heads", "attention", "block")))}


@pytest.mark.parametrize("name", [n if n in EVERYDAY else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_copy_without_half_a_space_equals_the_oracle(name: str) -> None:
    program, coupling = captured(name)
    hazard = HAZARDS[name]
    copy = Copy(program, coupling, CPU)
    inputs = hazard.inputs(2)
    before = run(copy.module, inputs)
    tried = 0
    for number, space in enumerate(coupling.spaces[:4]):
        units = np.arange(0, len(space), 2)
        if len(units) == len(space):
            continue
        stays = np.ones(len(space), dtype=bool)
        stays[units] = False
        expected = run(zeroed(built(name), coupling, {number: units}, hazard), inputs)
        with copy.without(space.name, stays) as module:
            assert distance(run(module, inputs), expected) <= 1e-4 * max(scale(expected), 1e-6)
        tried += 1
    if not tried:
        pytest.skip("nothing may leave")
    assert distance(run(copy.module, inputs), before) == 0.0  # put back, bit for bit


@pytest.mark.parametrize("name", ["convnext_block", "window_attention", "residual"])
def test_half_of_all_spaces_at_once_equals_the_oracle_cut_from_the_graph_or_not(name: str) -> None:
    program, coupling = captured(name)
    hazard = HAZARDS[name]
    copy = Copy(program, coupling, CPU)
    units = {number: np.arange(0, len(s), 2) for number, s in enumerate(coupling.spaces) if len(s) > 1}
    stays = {coupling.spaces[n].name: np.arange(len(coupling.spaces[n])) % 2 == 1 for n in units}
    inputs = hazard.inputs(2)
    before = run(copy.module, inputs)
    expected = run(zeroed(built(name), coupling, units, hazard), inputs)
    assert len(units) > 1 and distance(before, expected) > 1e-3 * scale(expected)
    with copy.without_all(stays) as module:
        assert distance(run(module, inputs), expected) <= 1e-4 * max(scale(expected), 1e-6)
    assert distance(run(copy.module, inputs), before) == 0


def test_a_mask_is_zeros_in_the_weight_and_nothing_else() -> None:
    program, coupling, _ = parts()
    weights = {n: program.state[n].detach() for n in ("a.weight", "b.weight", "fc.weight")}
    for text in ("element", "row", "2:4", "2x3"):
        g = Granularity.parse(text)
        by_cell = {n: g.reduce(w.abs().numpy()) for n, w in weights.items()}
        seen = measure(parts=(program, coupling, Scores(criterion="l1", by_space={}, granularity=text, by_cell=by_cell)), amounts=(0.5,))  # fmt: skip
        assert seen.granularity == text
        assert set(seen.increase) == set(weights)
        for name, points in seen.increase.items():
            (kept, increase), *_ = points.items()
            assert seen.of[name] == weights[name].numel()
            net = Net().eval()
            net.load_state_dict(program.module.state_dict())
            budget = None if text == "2:4" else Budget(density=0.5)
            plan = allocate(
                coupling, Scores(criterion="l1", by_space={}, granularity=text, by_cell=by_cell), examine(program), budget, include=[name]
            )  # fmt: skip
            assert plan.masks[name].num_kept == kept
            with torch.no_grad():
                net.get_parameter(name).mul_(torch.from_numpy(plan.masks[name].kept))
            assert increase == pytest.approx(mean_loss(net) - mean_loss(program.module), abs=1e-6)


def test_a_metric_counts_in_the_direction_that_is_worse() -> None:
    def evaluate(predict: Any) -> dict[str, Any]:
        return {"value": np.concatenate([(predict(x).argmax(1) == y).numpy() * 100.0 for x, y in data()])}

    best = measure(batches=None, loss=None, evaluate=evaluate, metric=Metric(name="value", unit="%", goal="max"))
    worst = measure(batches=None, loss=None, evaluate=evaluate, metric=Metric(name="value", unit="%", goal="min"))
    assert best.unit == "%"
    assert best.num_samples == 19
    pairs = [(best.increase[n][k], worst.increase[n][k]) for n in best.increase for k in best.increase[n]]
    assert all(a == -b for a, b in pairs if a is not None and b is not None)
    assert any(a for a, _ in pairs)


@pytest.mark.parametrize("how", ["mse", "kl"])
def test_a_distance_needs_no_labels(how: Any) -> None:
    program, coupling, scores = parts()
    seen = measure(batches=[x for x, _ in data()], loss=None, distance=how)
    assert seen.dense == 0.0
    space = coupling.spaces[0]
    kept = min(seen.increase[space.name])
    plan = allocate(
        coupling, scores, examine(program), Budget(channels=kept), align=1, floor=0.0, include=[space.name.replace("[", "[[]")]
    )  # fmt: skip
    small = prune(program, plan).module
    x = torch.cat([x for x, _ in data()])
    with torch.no_grad():
        y, y0 = small(x).double(), program.module(x).double()
    if how == "mse":
        expected = float(((y - y0) ** 2).sum() / (y0**2).sum())
    else:
        expected = float(F.kl_div(y.log_softmax(1), y0.log_softmax(1), log_target=True, reduction="batchmean"))
    assert seen.increase[space.name][kept] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-4


def test_batch_norm_can_be_measured_anew_at_every_point() -> None:
    program, coupling, scores = parts()
    seen = measure(batch_norm=data, include=["b"], amounts=(0.25,))
    fresh = reestimate_batch_norm(program.module, data, program.inputs, step=loss)
    assert seen.dense == pytest.approx(mean_loss(fresh))
    assert seen.dense != pytest.approx(mean_loss(program.module))
    plan = allocate(coupling, scores, examine(program), Budget(channels=3), align=1, floor=0.0, include=["b"])
    small = reestimate_batch_norm(prune(program, plan).module, data, program.inputs, step=loss)
    assert seen.increase["b.weight[0]"][3] == pytest.approx(mean_loss(small) - mean_loss(fresh), abs=1e-5)


def test_channels_that_no_weight_reads_are_cut_from_the_graph() -> None:
    """Across a layer norm zeros in the reads would not do: the norm counts them."""
    program, coupling = captured("convnext_block")
    copy = Copy(program, coupling, CPU)
    kinds = set()
    for space in coupling.spaces:
        if len(space) > 1:
            with copy.without(space.name, np.arange(len(space)) > 0) as module:
                kinds.add(isinstance(module, GraphModel))
    assert kinds == {True, False}


# --------------------------------------------------------------------------------------------- stopped, crashed, resumed


def test_the_same_call_gives_the_same_numbers_and_changes_nothing() -> None:
    program, *_ = parts()
    before = {n: t.clone() for n, t in program.module.state_dict().items()}
    state = torch.get_rng_state()
    assert measure() == measure()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in program.module.state_dict().items())


def test_a_stopped_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    journal, calls = tmp_path / "sub" / "points.jsonl", []

    def counting(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        if stop and len(calls) > 10:
            raise KeyboardInterrupt
        return loss(model, batch)

    stop = True
    with pytest.raises(Interrupted):
        measure(loss=counting, journal=journal)
    written = len(journal.read_text().splitlines())
    assert 0 < written < 4
    with journal.open("a") as file:
        file.write('{"cell": {"cut short')  # a kill in the middle of a line
    stop, first = False, len(calls)
    seen: list[Measuring] = []
    result = measure(loss=counting, journal=journal, progress=seen.append)
    assert len(calls) - first == 3 * (1 + 4 - written)
    assert result.increase == measure(loss=loss).increase
    assert [(m.done, m.total) for m in seen] == [(n + 1, 4) for n in range(4)]
    again = len(calls)
    assert measure(loss=counting, journal=journal) == result
    assert len(calls) - again == 3  # the dense model alone
    assert all(
        json.loads(line)["measured"]["increase"]["badge"] == "measured" for line in journal.read_text().splitlines()
    )


def test_points_of_another_function_of_the_same_name_are_not_taken(tmp_path: Path) -> None:
    journal = tmp_path / "points.jsonl"

    def one_of() -> Any:
        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            return F.cross_entropy(model(batch[0]), batch[1])

        return loss

    def two_of() -> Any:
        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            return 2.0 * F.cross_entropy(model(batch[0]), batch[1])

        return loss

    one, doubled = measure(loss=one_of(), journal=journal), measure(loss=two_of(), journal=journal)
    lines = len(journal.read_text().splitlines())
    assert measure(loss=one_of(), journal=journal) == one and measure(loss=two_of(), journal=journal) == doubled
    assert len(journal.read_text().splitlines()) == lines  # both were there
    assert doubled.dense == pytest.approx(2 * one.dense)


def test_other_data_or_scores_do_not_take_over_points(tmp_path: Path) -> None:
    journal = tmp_path / "points.jsonl"
    program, coupling, _ = parts()
    one = measure(journal=journal)
    other = measure(journal=journal, batches=data()[:1])
    assert other == measure(batches=data()[:1])
    assert other.increase != one.increase
    l2 = score(program, coupling, "random")
    assert measure(journal=journal, parts=(program, coupling, l2)) == measure(parts=(program, coupling, l2))
    assert measure(journal=journal) == one


def test_a_point_that_crashes_is_missing_and_tried_again(tmp_path: Path) -> None:
    broken = True

    def fragile(model: nn.Module, batch: Any) -> torch.Tensor:
        value = loss(model, batch)
        zeros = int((model.fc.weight == 0).all(0).sum())  # type: ignore[union-attr]
        if broken and zeros == 6:
            msg = "exploded"
            raise RuntimeError(msg)
        return value * float("nan") if broken and zeros == 4 else value

    journal = tmp_path / "points.jsonl"
    seen = measure(loss=fragile, journal=journal)
    name = "a.weight[0]"
    assert seen.increase[name] == {4: None, 2: None}
    assert seen.missing == {f"{name} @ 4": "the value is nan", f"{name} @ 2": "RuntimeError: exploded"}
    assert seen.curve(name)[0].tolist() == [8.0]
    assert None not in seen.increase["b.weight[0]"].values()
    assert Sensitivity.from_json(seen.to_json()) == seen
    program, coupling, scores = parts()
    made = allocate(
        coupling, scores, examine(program), Budget(macs=0.7), allocation="greedy", sensitivity=seen, align=1
    )
    assert made.made_by["unmeasured"] == [name]
    broken = False
    assert measure(loss=fragile, journal=journal).missing == {}


# ------------------------------------------------------------------------------------------------------- from end to end


def test_measured_on_one_model_it_allocates_and_prunes() -> None:
    program, coupling, scores = parts()
    seen = measure(amounts=(0.75, 0.5, 0.25))
    for how in ("sensitivity", "greedy", "knapsack"):
        plan = allocate(coupling, scores, examine(program), Budget(macs=0.5), allocation=how, sensitivity=seen, align=1)  # type: ignore[arg-type]
        small = prune(program, plan)
        assert examine(capture(small.module, program.inputs, train=False)).macs == plan.made_by["reached"]["macs"]
        assert plan.made_by["sensitivity"]["num_samples"] == 19


# ---------------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"loss": None}, UsageError, "one of loss, evaluate and distance"),
        ({"distance": "mse"}, UsageError, "loss and distance"),
        ({"loss": None, "distance": "cosine"}, UsageError, "distance"),
        ({"loss": None, "evaluate": lambda predict: {}}, UsageError, "metric"),
        ({"batches": None}, UsageError, "batches"),
        ({"batches": []}, RejectedError, "at least one batch"),
        ({"num_batches": 0}, UsageError, "num_batches"),
        ({"amounts": (1.0,)}, UsageError, "amounts"),
        ({"amounts": (2,)}, UsageError, "amounts"),
        ({"amounts": ()}, UsageError, "amounts"),
        ({"exclude": ["*"]}, NothingToDo, "something to measure"),
        ({"exclude": ["layer9"]}, UsageError, "matches nothing"),
        ({"loss": lambda model, batch: model(batch[0]).sum() * float("nan")}, RejectedError, "finite value"),
    ],
)
def test_wrong_requests_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        measure(**options)


def test_a_loss_that_cannot_run_says_so_before_anything_is_measured() -> None:
    with pytest.raises(TypeError):
        measure(loss=lambda model: model)
