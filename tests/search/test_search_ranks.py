"""The search for a budget by ranks: counts as they are after factorizing, files as the disk has them, two limits at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from paredown.couple import couple
from paredown.errors import InfeasibleError
from paredown.examine import examine
from paredown.export import export
from paredown.factorize import factorize
from paredown.program import capture
from paredown.score import score
from paredown.search.budgets import Search, meet
from paredown.search.candidates import maker
from paredown.search.ranks import RankSearch


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 25, 24)
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 12, 12)
    program, folder = capture(net, x[:2]), tmp_path_factory.mktemp("ranks")
    coupling = couple(program)
    return RankSearch(
        program=program, coupling=coupling, cost=examine(program), scores=score(program, coupling, "l1"), asked={"macs": 1.0},
        make=maker(program, target="onnxruntime-x86", scheme="fp32", calibrate=[x]),
        dense=export(program, folder / "dense.onnx"), samples=[x], folder=folder, seconds=0.1, runs=5, key="k",
        options={"method": "svd", "align": 1},
    )  # fmt: skip


def counted(search, plan):
    small = factorize(search.program, plan)
    found = examine(capture(small.module, search.program.inputs))
    return {"macs": found.macs, "parameters": found.parameters}


@pytest.mark.parametrize("shares", [{"macs": 0.5}, {"parameters": 0.4}, {"macs": 0.6, "parameters": 0.5}])
def test_every_count_holds_after_factorizing(search, shares):
    asked = {n: share * getattr(search.cost, n) for n, share in shares.items()}
    met = meet(dataclasses.replace(search, asked=asked))
    found = counted(search, met.plan)
    assert met.plan.ranks and not met.plan.keep
    assert all(found[n] <= limit for n, limit in asked.items())
    assert max(found[n] / limit for n, limit in asked.items()) > 0.9  # and little is given away
    assert {n: met.chosen.measured[n] for n in found} == found


def test_bytes_are_met_on_the_disk(search):
    limit = 0.5 * search.dense.path.stat().st_size
    met = meet(dataclasses.replace(search, asked={"size_bytes": limit}))
    again = search.make(met.plan, search.folder / "again.onnx").path.stat().st_size
    assert again == met.chosen.measured["size_bytes"] and 0.9 * limit <= again <= limit


def test_a_latency_needs_no_table(search):
    met = meet(dataclasses.replace(search, asked={"latency_ms": 1000.0}))
    assert met.already_met and met.shares == {}


def test_what_no_rank_reaches_comes_with_the_nearest_plan(search):
    with pytest.raises(InfeasibleError, match="macs must be at most") as caught:
        meet(dataclasses.replace(search, asked={"macs": 0.001 * search.cost.macs}))
    assert caught.value.nearest.ranks


def test_a_journal_that_knows_fewer_amounts_is_measured_again(search, tmp_path):
    """Files of one key may be asked for bytes first and for milliseconds later."""
    mine = dataclasses.replace(search, asked={"size_bytes": 1e9}, folder=tmp_path)
    assert meet(mine).already_met
    met = meet(dataclasses.replace(mine, asked={"size_bytes": 1e9, "latency_ms": 1000.0}))
    assert set(met.chosen.measured) >= {"size_bytes", "latency_ms"}
    fields = {f.name: getattr(mine, f.name) for f in dataclasses.fields(Search)}
    assert meet(Search(**{**fields, "make": None})).already_met  # the first ones are still known
