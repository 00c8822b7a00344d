"""A probe compares answers as they come: figures against arithmetic on all of them at once, and what is in memory."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.errors import RejectedError, ResourceError
from paredown.search import probe as probes
from paredown.search.probe import Distance, Probe
from paredown.train import Metric, Task

LENGTHS = (5, 5, 3)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()


def batches() -> list[Tensor]:
    return [torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(n + i)) for i, n in enumerate(LENGTHS)]


def task_of(evaluate: Any) -> Task:
    return Task(
        name="maps", model=lambda: net(0), inputs=lambda: batches()[0], calibration_batches=lambda: iter(batches()),
        evaluate=evaluate, choose=evaluate, metric=Metric(name="accuracy", unit="%", goal="max"),
    )  # fmt: skip


def spoiling(predict: Any) -> dict[str, Any]:
    """An evaluate that writes into the answers it was given."""
    found = []
    for x in batches():
        answer = predict(x)
        found.append(100.0 * (answer.argmax(1) == 0).float().flatten(1).mean(1).numpy())
        answer.zero_()
    return {"accuracy": np.concatenate(found)}


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("in_memory", [1, 1 << 20])
def test_figures_are_those_of_all_answers_at_once(
    distance: Distance, in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "IN_MEMORY_BYTES", in_memory)
    dense, other = net(0), net(1)
    with torch.no_grad():
        x = torch.cat(batches())
        wanted, now = dense(x).double(), other(x).double()
    if distance == "kl":
        each = F.kl_div(F.log_softmax(now, 1), F.softmax(wanted, 1), reduction="none").sum(1).flatten(1).mean(1)
    else:
        each = (now - wanted).square().flatten(1).sum(1) / wanted.square().flatten(1).sum(1).mean()
    with closing(Probe(task_of(spoiling), dense, distance, folder=tmp_path)) as probe:
        seen = probe.of(other)
        assert probe.num_samples == len(x) and probe.of(dense).distance == 0.0
        again = probe.of(other)
    assert seen.distance == pytest.approx(float(each.mean()), rel=1e-6) and seen.distance > 0.01
    assert seen.distance_groups == pytest.approx(each.tolist(), rel=1e-5) and again == seen
    hits = [100.0 * (y.argmax(1) == 0).double().flatten(1).mean(1) for y in (wanted, now)]
    assert seen.metric == pytest.approx(float((hits[0] - hits[1]).mean()))
    assert not [*tmp_path.iterdir()]


def test_answers_of_one_call_alone_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "IN_MEMORY_BYTES", 1)
    alive: list[int] = []

    def watching(predict: Any) -> dict[str, float]:
        kept: list[weakref.ref[Tensor]] = []
        for x in batches():
            answer = predict(x)
            kept.append(weakref.ref(answer))
            del answer
            alive.append(sum(ref() is not None for ref in kept))
        return {"accuracy": 50.0}

    with closing(Probe(task_of(watching), net(0), "mse", folder=tmp_path)) as probe:
        probe.of(net(1))
        stored = probe._answers._file
        assert stored._rolled and stored.seek(0, 2) == 4 * 3 * 36 * sum(LENGTHS)
    assert alive == [0] * 2 * len(LENGTHS)


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "IN_MEMORY_BYTES", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(
            ResourceError, match=rf"{tmp_path} must have room for the dense network's answers. Got File too large"
        ):
            Probe(task_of(spoiling), net(0), "mse", folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["wider", "fewer calls", "more calls"])
def test_answers_of_other_shapes_or_number_are_refused(kind: str) -> None:
    calls = [3]

    def uneven(predict: Any) -> dict[str, float]:
        for x in [*batches(), *batches()][: calls[0]]:
            predict(x)
        return {"accuracy": 50.0}

    with closing(Probe(task_of(uneven), net(0), "mse")) as probe:
        calls[0] = {"wider": 3, "fewer calls": 2, "more calls": 4}[kind]
        wider = nn.Sequential(net(1), nn.Conv2d(3, 4, 1)).eval()
        with pytest.raises(RejectedError, match="must have the shapes of the dense network's, call by call"):
            probe.of(wider if kind == "wider" else net(1))


@pytest.mark.parametrize("spoilt", ["nan", "integers", "nothing"])
def test_a_dense_network_without_finite_answers_is_refused(spoilt: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1).long() if spoilt == "integers" else x / 0 * 0

    def nothing(predict: Any) -> dict[str, float]:
        return {"accuracy": 50.0}

    task = task_of(
        nothing if spoilt == "nothing" else lambda predict: {"accuracy": float(sum(len(predict(x)) for x in _few()))}
    )
    with pytest.raises(RejectedError, match="finite floating outputs on held-out data"):
        Probe(task, net(0) if spoilt == "nothing" else Odd(), "mse")


def _few() -> Iterator[Tensor]:
    yield from batches()[:2]
