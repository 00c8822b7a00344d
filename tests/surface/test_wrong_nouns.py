"""A verb that is given something else than its noun says what it must be given, and what it got."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paredown as pare
from paredown.errors import UsageError

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
DATA = [(X, Y)]


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _parts() -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    program = pare.capture(net, X)
    coupling, cost = pare.couple(program), pare.examine(program)
    scores = pare.score(program, coupling)
    plan = pare.allocate(coupling, scores, cost, pare.Budget(channels=0.5))
    small = pare.prune(program, plan)
    return {"net": net, "p": program, "c": coupling, "cost": cost, "s": scores, "plan": plan, "small": small}


HALF = pare.Budget(macs=0.5)
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "couple": (lambda v: pare.couple(v["net"]), "program must be a Program. Got Sequential. Use paredown.capture"),
    "score": (lambda v: pare.score(v["net"], v["c"]), "program must be a Program. Got Sequential"),
    "score coupling": (lambda v: pare.score(v["p"], v["p"]), "coupling must be a Coupling. Got Program"),
    "score loss": (lambda v: pare.score(v["p"], v["c"], "taylor", batches=DATA, loss=3), "loss must be a Callable. Got int"),
    "allocate": (lambda v: pare.allocate(v["p"], v["s"], v["cost"], HALF), "coupling must be a Coupling. Got Program"),
    "allocate scores": (lambda v: pare.allocate(v["c"], v["c"], v["cost"], HALF), "scores must be a Scores. Got Coupling"),
    "allocate budget": (
        lambda v: pare.allocate(v["c"], v["s"], v["cost"], 0.5), r"budget must be a Budget. Got float. .*Budget\(macs=0.5\)"
    ),
    "sensitivity table": (
        lambda v: pare.allocate(v["c"], v["s"], v["cost"], HALF, allocation="greedy", sensitivity={"0.weight[0]": 3}),
        r"sensitivity\['0.weight\[0\]'\] must be a Mapping. Got int. Give \{kept: increase\}",
    ),
    "latency table": (
        lambda v: pare.allocate(v["c"], v["s"], v["cost"], pare.Budget(latency_ms=1.0), latency={"0.weight[0]": 3}),
        r"latency\['0.weight\[0\]'\] must be a Mapping. Got int",
    ),
    "prune": (lambda v: pare.prune(v["net"], v["plan"]), "program must be a Program. Got Sequential. Use paredown.capture"),
    "prune plan": (lambda v: pare.prune(v["p"], v["s"]), "plan must be a Plan. Got Scores"),
    "compose": (lambda v: pare.compose(v["small"], v["small"].module), "second must be a Pruned. Got Sequential"),
    "condense": (lambda v: pare.condense(v["p"]), "pruned must be a Pruned. Got Program"),
    "reconstruct": (lambda v: pare.reconstruct(v["p"], DATA, step=step), "pruned must be a Pruned. Got Program. Use paredown.prune"),
    "reconstruct step": (lambda v: pare.reconstruct(v["small"], DATA, step=3), "step must be a Callable. Got int"),
    "recover": (lambda v: pare.recover(v["net"], DATA, step=step), "recover must be given what prune returned, a Pruned. Got Sequential"),
    "recover step": (lambda v: pare.recover(v["small"], DATA, step=3), "step must be a function .*Got int"),
    "recover train": (lambda v: pare.recover(v["small"], train=3), "train must be a function .*Got int"),
    "recover teacher": (lambda v: pare.recover(v["small"], DATA, step=step, teacher="x"), "teacher must be the dense model, .*Got str"),
    "epochs": (lambda v: pare.recover(v["small"], DATA, step=step, epochs=1.5), "epochs must be a whole number ≥ 0. Got 1.5"),
    "momentum": (lambda v: pare.recover(v["small"], DATA, step=step, momentum=-1), r"momentum must be in \[0, 1\). Got -1"),
    "decay": (lambda v: pare.recover(v["small"], DATA, step=step, weight_decay=-1), "weight_decay must be a finite number ≥ 0. Got -1"),
    "seed": (lambda v: pare.recover(v["small"], DATA, step=step, seed="a"), "seed must be a whole number. Got 'a'"),
    "lr": (lambda v: pare.recover(v["small"], DATA, step=step, lr="x"), "lr must be a number. Got 'x'"),
    "sparsify": (lambda v: pare.sparsify(v["net"], DATA, step=step, density=0.5), "model must be a Program or a Pruned. Got Sequential"),
    "sparsify budget": (
        lambda v: pare.sparsify(v["p"], DATA, step=step, granularity="channel", budget=0.5), "budget must be a Budget. Got float"
    ),
    "sensitivity": (lambda v: pare.sensitivity(v["p"], v["c"], v["plan"], batches=DATA, loss=step), "scores must be a Scores. Got Plan"),
    "masks_of": (lambda v: pare.masks_of(v["p"], [1]), "given must be a Mapping or a str or a Path. Got list"),
    "masks_of model": (lambda v: pare.masks_of(v["net"], {}), "program must be a Program. Got Sequential"),
    "take_over": (lambda v: pare.take_over([v["net"]]), "model must be a Module. Got list"),
    "choose_ranks": (lambda v: pare.choose_ranks(v["p"], 0.5), "budget must be a Budget. Got float"),
    "factorize": (lambda v: pare.factorize(v["p"], v["small"]), "plan must be a Plan. Got Pruned"),
    "score_depth": (lambda v: pare.score_depth(v["net"], [X]), "program must be a Program. Got Sequential"),
    "mask_sizes": (lambda v: pare.mask_sizes(v["net"]), "pruned must be a Pruned. Got Sequential"),
    "keep_masks": (lambda v: pare.keep_masks(v["net"], v["small"]).__enter__(), "plan must be a Plan or a Mapping. Got Pruned. .*small.plan"),
    "save": (lambda v: pare.save(v["p"], "nowhere"), "pruned must be a Pruned. Got Program"),
    "load_pruned": (lambda v: pare.load_pruned("nowhere", v["net"]), "program must be a Program. Got Sequential"),
    "compress budget": (
        lambda v: pare.compress(v["net"], X, train=print, calibrate=[X], evaluate=print, metric={}, budget=0.5, out="nowhere"),
        "budget must be a Budget. Got float",
    ),
    "compress metric": (
        lambda v: pare.compress(v["net"], X, train=print, calibrate=[X], evaluate=print, metric={"name": "a"}, out="nowhere"),
        'metric must be {"name": "accuracy", "unit": "%", "goal": "max"}',
    ),
    "compress calibrate": (
        lambda v: pare.compress(
            v["net"], X, train=print, calibrate=iter([X]), evaluate=print, metric={"name": "a", "unit": "", "goal": "max"}, out="nowhere"
        ),
        "calibrate must be there for more than one pass.*Got list_iterator",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return _parts()


@pytest.mark.parametrize("name", CALLS)
def test_the_message_says_what_must_be_given(name: str, parts: dict[str, Any]) -> None:
    call, says = CALLS[name]
    with pytest.raises(UsageError, match=says):
        call(parts)


def test_another_models_coupling_is_refused(parts: dict[str, Any]) -> None:
    other = pare.capture(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), X)
    with pytest.raises(
        UsageError, match=r"must be of this program, .* 16 channels along axis 0 of 2.weight, and only 3 of them"
    ):
        pare.score(parts["p"], pare.couple(other))
    with pytest.raises(UsageError, match=r"16 channels along axis 0 of 0.weight, and only 8 of them"):
        pare.score(pare.capture(parts["small"].module, X), parts["c"])


def test_a_pruned_model_is_not_saved_onto_a_file(tmp_path: Path, parts: dict[str, Any]) -> None:
    file = tmp_path / "model"
    file.write_text("mine")
    with pytest.raises(UsageError, match=f"must be saved to a folder. Got the file {file}"):
        pare.save(parts["small"], file)
    assert file.read_text() == "mine"
