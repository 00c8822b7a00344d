"""The search for a budget on real files: layers as they are after pruning, bytes as the disk has them, plans that hold."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from torch import nn

from hazards import HAZARDS
from paredown.allocate import Latency, allocate
from paredown.budget import Budget
from paredown.couple import couple
from paredown.errors import InfeasibleError, NothingToDo, ResourceError, UsageError
from paredown.examine import examine
from paredown.export import export
from paredown.measure.latency import TRIES
from paredown.measure.layer_tables import AT_ONCE, Setting
from paredown.program import capture
from paredown.prune import prune
from paredown.records import Measured, Record
from paredown.score import score
from paredown.search import budgets, sensitivity
from paredown.search import layers as layers_module
from paredown.search.budgets import Round, Search, _infeasible, layer_shares, meet
from paredown.search.candidates import kept_units, maker
from paredown.search.journal import measured_files
from paredown.search.layers import latency_table, timed_layers


class Net(nn.Module):
    """Plain, depthwise, grouped and linear layers around a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 32, 1)
        self.inner = nn.Conv2d(32, 48, (3, 1), stride=2)
        self.outer = nn.Conv2d(48, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.point(torch.relu(self.deep(x)))
        x = torch.relu(self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    program = capture(Net().eval(), torch.randn(2, 3, 12, 12))
    return program, couple(program), examine(program)


@pytest.fixture(scope="module")
def search(given, tmp_path_factory):
    program, coupling, cost = given
    folder, x = tmp_path_factory.mktemp("search"), torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return Search(
        coupling=coupling, cost=cost, scores=score(program, coupling, "l1"), asked={"size_bytes": 1e9},
        make=maker(program, target="onnxruntime-x86", scheme="fp32", calibrate=[x]),
        dense=export(program, folder / "dense.onnx"), samples=[x], folder=folder, seconds=0.2, runs=10, key="k",
        options={"allocation": "uniform"},
    )  # fmt: skip


def test_layers_are_all_that_multiplies(given):
    program, coupling, cost = given
    layers = timed_layers(program, coupling, cost)
    assert [x.name for x in layers] == ["stem", "deep", "point", "inner", "outer", "head"]
    assert sum(x.dense.macs for x in layers) == cost.macs
    assert [x.dense.groups for x in layers] == [1, 32, 1, 1, 1, 1]


class Frames(nn.Module):
    """A clip whose frames go through the convolution as if they were a batch."""

    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        y = self.each(x.flatten(0, 1)).mean((2, 3))
        return self.head(y).view(x.shape[0], -1, 5).mean(1)


class TokensFirst(nn.Module):
    """As torchvision's vision transformer: patches, and attention on [tokens, batch, channels]."""

    def __init__(self):
        super().__init__()
        self.patch, self.attend, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.MultiheadAttention(8, 2), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).permute(2, 0, 1)
        return self.head((x + self.attend(x, x, x, need_weights=False)[0]).mean(0))


def layers_and_cost(module, x):
    program = capture(module.eval(), x, train=False)
    cost = examine(program)
    return {layer.name: layer.dense for layer in timed_layers(program, couple(program), cost)}, cost


@pytest.mark.parametrize("build", [HAZARDS["window_attention"].build, TokensFirst])
def test_windows_and_tokens_beside_the_batch_are_rows(build):
    """What multiplies an activation by another is no layer; all else is in the table as often as it is counted."""
    layers, cost = layers_and_cost(build(), torch.randn(2, 3, 8, 8))
    weighed = sum(n.macs for n in cost.by_node if n.weights)
    assert sum(shape.macs for shape in layers.values()) == weighed
    assert len(layers) == 4


def test_a_convolution_on_the_frames_of_a_clip_is_left_out():
    layers, cost = layers_and_cost(Frames(), torch.randn(2, 6, 3, 8, 8))
    assert {name: shape.positions for name, shape in layers.items()} == {"head": (6,)}
    assert layers["head"].macs == 6 * 8 * 5 < cost.macs


def test_convolutions_that_keep_the_size_are_timed_where_one_side_gets_more_too():
    same = {"padding": "same", "dilation": 2}
    net = nn.Sequential(
        nn.Conv2d(3, 16, (3, 5), **same), nn.Conv2d(16, 8, 3, padding="valid"), nn.Conv2d(8, 8, 4, **same)
    )
    layers, _ = layers_and_cost(net, torch.randn(2, 3, 12, 12))
    assert {name: shape.padding for name, shape in layers.items()} == {"0": (2, 4), "1": (0, 0), "2": (3, 3)}
    net[2] = nn.Conv2d(8, 8, (4, 3), padding="same", groups=2)  # one more on one side of one axis
    layers, cost = layers_and_cost(net, torch.randn(2, 3, 12, 12))
    assert (layers["2"].padding, layers["2"].positions, layers["2"].after) == ((1, 1), (11, 10), [10, 10])
    assert sum(shape.macs for shape in layers.values()) == cost.macs


def test_of_a_fixed_batch_every_layer_is_there_with_one_sample():
    program = capture(Net().eval(), torch.randn(4, 3, 12, 12), train=False, dynamic_batch=False)
    cost = examine(program)
    assert cost.samples == 4
    assert 4 * sum(x.dense.macs for x in timed_layers(program, couple(program), cost)) == cost.macs


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_shapes_that_a_table_foresees_are_those_after_pruning(given, share):
    program, coupling, cost = given
    plan = allocate(coupling, score(program, coupling, "l1"), cost, Budget(channels=share))
    small = capture(prune(program, plan).module, program.inputs)
    wanted = {x.name: x.dense for x in timed_layers(small, couple(small), examine(small))}
    units, kept = {s.name: len(s) for s in coupling.spaces}, kept_units(coupling, plan)
    for layer in timed_layers(program, coupling, cost):
        lengths = [int(length.of(units, kept)) for length in (layer.writes, layer.reads)]
        assert layer.at(*lengths) == wanted[layer.name]


def test_the_table_is_the_sum_of_what_was_timed(given, tmp_path, monkeypatch):
    monkeypatch.setenv("PAREDOWN_LATENCY", str(tmp_path))
    program, coupling, cost = given
    table = latency_table(program, coupling, cost, Setting())
    units = {s.name: len(s) for s in coupling.spaces}
    dense = float(table.total(units, {n: np.array(k) for n, k in units.items()}))
    assert dense == pytest.approx(sum(float(x.ms[-1, -1]) for x in table.layers))
    assert dense > 0
    assert {x.name: len(x.out_channels) > 1 for x in table.layers} == {
        "stem": True, "deep": True, "point": True, "inner": True, "outer": True, "head": False,
    }  # fmt: skip


def lanes(shape, slow=1.0):
    """Milliseconds of kernels that take eight channels at once, and where one is left over another kernel that is `slow`."""
    written = -(-shape.out_channels // 8)
    return written * shape.in_channels / shape.groups * (slow if shape.out_channels % 8 else 1.0)


def table_of(given, monkeypatch, ms, **options):
    timed: list[list] = []

    def times(groups, setting, progress):
        timed.extend(list(dict.fromkeys(g)) for g in groups)
        return {s: Measured(value=ms(s), unit="ms") for g in timed for s in g}

    monkeypatch.setattr(layers_module, "layer_times", times)
    return {x.name: x for x in latency_table(*given, Setting(), **options).layers}, timed


@pytest.mark.parametrize("align", [1, 4, 8])
def test_the_table_shows_the_steps_of_alignment(given, monkeypatch, align):
    layers, timed = table_of(given, monkeypatch, lanes, align=align)
    assert all(len(group) <= AT_ONCE for group in timed)
    assert {17, 25} <= set(layers["stem"].out_channels)
    for name, read in (("stem", 3), ("point", 32), ("deep", 1)):
        found = layers[name].at(np.array([16, 17, 18, 20, 23, 24]), read)
        assert found[1:] == pytest.approx([3.0 * read] * 5), name  # all up to 24 as long as 24
        assert found[0] == pytest.approx(2.0 * read)
    assert layers["head"].out_channels == (5,)  # classes do not leave
    assert layers["stem"].at([[17], [32]], [3, 3]).tolist() == [[9, 9], [12, 12]]


def test_kernels_of_sixteen_lanes_show_where_axes_are_short(given, monkeypatch):
    """24 channels take what 32 take, written and read: a line from 16 to 32 would sell eight of them for nothing."""
    layers, _ = table_of(given, monkeypatch, lambda s: float(-(-s.out_channels // 16) * -(-s.in_channels // 16)))
    assert layers["inner"].at([16, 24, 32, 40, 48], 32).tolist() == [2, 4, 4, 6, 6]
    assert layers["inner"].at(48, [8, 16, 24, 32]).tolist() == [3, 3, 6, 6]


def test_a_slow_kernel_above_a_multiple_says_nothing_of_other_multiples(given, monkeypatch):
    layers, _ = table_of(given, monkeypatch, lambda s: lanes(s, slow=5.0))
    assert layers["point"].at([16, 24, 32], 32).tolist() == [64, 96, 128]
    assert layers["inner"].at([24, 25, 28, 32, 40, 48], 32) == pytest.approx([96, 640, 640, 128, 160, 192])


def test_groups_that_divide_the_channels_are_timed_at_their_multiples_alone(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(32, 4, 1)).eval()
    program = capture(net, torch.randn(2, 3, 8, 8))
    layers, _ = table_of((program, couple(program), examine(program)), monkeypatch, lanes)
    assert all(n % 4 == 0 for n in layers["1"].out_channels)


def test_bytes_are_met_on_the_disk_and_nothing_is_given_away(search):
    share = 0.6
    dense = search.dense.path.stat().st_size
    met = meet(dataclasses.replace(search, asked={"size_bytes": share * dense}))
    file = search.make(met.plan, search.folder / "again.onnx")
    assert file.path.stat().st_size == met.chosen.measured["size_bytes"]
    assert (
        0.8 * share * dense <= file.path.stat().st_size <= share * dense
    )  # a step of 8 channels is a tenth of this file
    assert [r.number for r in met.rounds] == list(range(len(met.rounds)))
    assert len(met.rounds) <= 7
    assert all(not r.foreseen or abs(r.foreseen["size_bytes"] / r.measured["size_bytes"] - 1) < 0.2 for r in met.rounds)


@pytest.mark.parametrize("wins", ["knapsack", "uniform"])
def test_of_two_allocations_that_hold_the_one_that_moves_the_output_less_is_taken(given, search, wins):
    program, coupling, cost = given
    x = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(2))]
    seen = sensitivity(program, coupling, search.scores, batches=x, distance="mse", num_batches=1)
    asked = []

    def joint(plan):
        asked.append(plan.made_by["allocation"])
        return 0.1 if plan.made_by["allocation"] == wins else 0.2

    by_both = dataclasses.replace(
        search, asked={"macs": 0.5 * cost.macs}, also=["uniform"], joint=joint,
        options={"allocation": "knapsack", "sensitivity": seen, "align": 1},
    )  # fmt: skip
    met = meet(by_both)
    assert met.plan.made_by["allocation"] == met.chosen.by == wins and sorted(asked) == ["knapsack", "uniform"]
    assert met.chosen.error == 0.1 and met.chosen == met.rounds[met.chosen.number]
    assert sorted(r.error for r in met.rounds if r.error is not None) == [0.1, 0.2]
    assert all(met.chosen.measured[n] <= limit for n, limit in by_both.asked.items())
    alone = meet(dataclasses.replace(by_both, joint=None))  # nothing could tell which is better
    assert alone.plan.made_by["allocation"] == "knapsack" and {r.by for r in alone.rounds} == {"knapsack"}


@pytest.mark.parametrize("name", ["parameters", "macs", "size_bytes"])
@pytest.mark.parametrize("share", [0.9995, 0.99])
def test_a_limit_just_below_what_is_there_is_met_by_the_smallest_step(given, search, name, share):
    """An allocation comes within a percent, so that to keep all is nearest; a limit is a bound."""
    whole = {**dataclasses.asdict(given[2]), "size_bytes": search.dense.size_bytes}[name]
    met = meet(dataclasses.replace(search, asked={name: share * whole}))
    assert 0.85 * whole <= met.chosen.measured[name] <= share * whole


def test_an_allocation_that_finds_nothing_leaves_it_to_the_others(given, search):
    """Sensitivities at counts that alignment does not allow say nothing, and one share everywhere needs none."""
    name = given[1].spaces[0].name
    blind = dataclasses.replace(
        search, asked={"macs": 0.5 * search.cost.macs}, also=["uniform"], joint=lambda plan: 0.1,
        options={"allocation": "knapsack", "sensitivity": {name: {31: 0.1}}},
    )  # fmt: skip
    assert meet(blind).chosen.by == "uniform"
    with pytest.raises(NothingToDo, match="sensitivities must cover"):
        meet(dataclasses.replace(blind, also=[]))


def test_fault_86_an_output_that_is_not_finite_is_never_the_better_one(given, search):
    seen = {s.name: {0.5: 0.1, 0.25: 0.2} for s in given[1].spaces}
    by_both = dataclasses.replace(
        search, asked={"macs": 0.5 * search.cost.macs}, also=["uniform"],
        joint=lambda plan: float("nan") if plan.made_by["allocation"] == "knapsack" else 0.3,
        options={"allocation": "knapsack", "sensitivity": seen},
    )  # fmt: skip
    met = meet(by_both)
    assert met.chosen.by == "uniform"
    assert {r.error for r in met.rounds} == {None, 0.3}  # what a record can write


def test_bytes_of_half_a_file_in_float_are_not_pruned_to_the_floor(given, search):
    """A parameter takes four bytes here, where eight bits would lead to expect one; without expectation the first file says it."""
    dense = search.dense.path.stat().st_size
    for expected in (4.0, None):
        met = meet(dataclasses.replace(search, asked={"size_bytes": 0.6 * dense}, bytes_per_parameter=expected))
        assert 0.8 * 0.6 * dense <= met.chosen.measured["size_bytes"] <= 0.6 * dense


@pytest.mark.parametrize("scheme", ["w2", "binary"])
def test_bytes_of_a_few_bits_are_met(given, search, scheme):
    program, _, _ = given
    make = maker(program, target="onnxruntime-x86", scheme=scheme, calibrate=search.samples)
    whole = make(None, search.folder / "whole.onnx").size_bytes
    each = {"w2": 0.25, "binary": 0.125}[scheme]
    asked = {"size_bytes": 0.93 * whole}  # of so small a network most is no codes
    met = meet(dataclasses.replace(search, make=make, asked=asked, bytes_per_parameter=each, key=f"k {scheme}"))
    assert met.chosen.measured["size_bytes"] <= asked["size_bytes"]
    assert met.chosen.measured["parameters"] > 0.2 * search.cost.parameters


def test_fault_72_a_budget_that_is_met_already_changes_nothing(search):
    met = meet(dataclasses.replace(search, asked={"size_bytes": 1e9, "macs": 1e12}))
    assert met.already_met
    assert len(met.rounds) == 1


def test_the_network_as_it_is_is_never_the_nearest_plan(search, given):
    _program, coupling, cost = given
    plan = allocate(coupling, search.scores, cost, Budget(parameters=0.9))
    asked = dataclasses.replace(search, asked={"latency": 0.5})
    noisy = [
        Round(number=0, plan=None, foreseen={}, measured={"latency": 1.0}, holds=False),
        Round(number=1, plan=plan, foreseen={}, measured={"latency": 1.01}, holds=False),
    ]
    assert _infeasible(asked, noisy).nearest is plan
    assert _infeasible(asked, noisy[:1]).nearest is None
    assert "its codes may be what is slow" in _infeasible(asked, noisy).advice
    fast = dataclasses.replace(noisy[1], measured={"latency": 0.7})
    assert "its codes" not in _infeasible(asked, [noisy[0], fast]).advice
    ram = dataclasses.replace(noisy[1], measured={"peak_ram_bytes": 6e7})
    assert "the runtime's own" in _infeasible(dataclasses.replace(search, asked={"peak_ram_bytes": 1e6}), [ram]).advice


def test_fault_71_an_impossible_budget_says_the_nearest_plan(search):
    with pytest.raises(InfeasibleError, match=r"size_bytes must be at most 500 B. Got [\d,]+ B") as caught:
        meet(dataclasses.replace(search, asked={"size_bytes": 500.0}))
    assert caught.value.exit_code == 4
    assert all(len(axes[0]) <= 8 for name, axes in caught.value.nearest.keep.items() if name == "stem.weight")


def test_a_search_that_was_stopped_reads_its_journal(search, tmp_path):
    asked = {"size_bytes": 0.5 * search.dense.path.stat().st_size}
    mine = dataclasses.replace(search, asked=asked, folder=tmp_path)
    first = meet(mine)

    def never(plan, path):
        raise AssertionError("made again")  # every file was measured before

    again = meet(dataclasses.replace(mine, make=never))
    assert again.chosen == first.chosen
    assert [r.measured for r in again.rounds] == [r.measured for r in first.rounds]
    with pytest.raises(AssertionError, match="made again"):
        meet(dataclasses.replace(mine, make=never, key="another"))


def test_a_journal_with_a_line_that_says_nothing_keeps_the_others(search, tmp_path):
    mine = dataclasses.replace(search, asked={"size_bytes": 0.5 * search.dense.size_bytes}, folder=tmp_path)
    first, made = meet(mine), []
    journal = tmp_path / "search.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 1
    lines[0] = '{"cell": {}, "measured": []}'
    journal.write_text("\n".join(lines) + "\n" + lines[-1][:40], encoding="utf-8")

    def make(plan, path):
        made.append(plan)
        return search.make(plan, path)

    assert meet(dataclasses.replace(mine, make=make)).chosen == first.chosen
    assert made == [None]


def test_fault_91_a_journal_of_thousands_of_files_is_read_once(search, tmp_path):
    numbers = {n: Measured(value=1.0, unit="") for n in ("parameters", "macs", "size_bytes")}
    lines = [
        Record(cell={"stage": "search", "key": search.key}, plan_digest=f"{n:064}", measured=numbers).to_json()
        for n in range(3000)
    ]
    (tmp_path / "search.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    mine, start = measured_files(tmp_path / "search.jsonl"), time.process_time()
    assert all(len(mine.of(f"{n:064}", search.key)) == 1 for n in range(3000))
    assert mine.of(f"{5:064}", "another") == mine.of("other", search.key) == []
    assert time.process_time() - start < 10
    mine.add(Record(cell={"key": search.key}, plan_digest="other", measured=numbers))
    assert len(mine.of("other", search.key)) == 1
    with (tmp_path / "search.jsonl").open("a", encoding="utf-8") as file:  # as another process would
        file.write(lines[0].replace("0" * 64, "1" * 64) + "\n" + lines[1][:50])
    assert len(mine.of("1" * 64, search.key)) == 1


def test_fault_82_a_full_disk_is_no_file_that_cannot_be_made(search, tmp_path):
    def full(plan, path):
        msg = f"{path} must be writable. Got No space left on device."
        raise ResourceError(msg)

    with pytest.raises(ResourceError, match="No space left"):
        meet(dataclasses.replace(search, make=full, asked={"size_bytes": 1e9}, folder=tmp_path))


def test_counts_need_no_file_and_are_kept_exactly(search):
    def never(plan, path):
        raise AssertionError("made")

    for name in ("parameters", "macs"):
        limit = 0.5 * getattr(search.cost, name)
        met = meet(
            dataclasses.replace(search, asked={name: limit}, make=never, options={"allocation": "uniform", "align": 1})
        )
        assert 0.9 * limit <= met.chosen.measured[name] <= limit


def test_latency_takes_turns_with_the_dense_file(given, search, tmp_path, monkeypatch):
    """On a network this small a clock decides little: that the numbers belong together is what is tested."""
    monkeypatch.setenv("PAREDOWN_LATENCY", str(tmp_path))
    program, coupling, cost = given
    table = latency_table(program, coupling, cost, Setting())
    mine = dataclasses.replace(search, asked={"latency_ms": 1000.0}, table=table, folder=tmp_path)
    met = meet(mine)
    assert met.already_met
    assert 0.5 < met.chosen.measured["latency"] < 2  # the same file against itself
    shares = layer_shares(mine, None)
    assert sum(shares.values()) == pytest.approx(1.0)
    with pytest.raises(InfeasibleError, match=r"latency must be at most 0\.0001 × dense"):
        meet(dataclasses.replace(mine, asked={"latency": 1e-4}, rounds=1))


class Clock:
    """A clock by which a file takes as long as it has bytes, and on which other load works in some schedules: it slows small files more."""

    def __init__(self, *busy):
        self.busy, self.number = busy, -1

    def __call__(self, files, samples, **_):
        self.number += 1
        times = {name: 10.0 * file.size_bytes / files["dense"].size_bytes for name, file in files.items()}
        return times if self.number not in self.busy else {"this": 1.5 * times["this"], "dense": 1.17 * times["dense"]}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Wide enough that its bytes are those of its parameters, with many steps between."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))
    program, x, folder = capture(net.eval(), torch.randn(2, 16)), torch.randn(4, 16), tmp_path_factory.mktemp("wide")
    coupling = couple(program)
    return Search(
        coupling=coupling, cost=examine(program), scores=score(program, coupling, "l1"), asked={"latency": 0.5},
        make=maker(program, target="onnxruntime-x86", scheme="fp32", calibrate=[x]), table=Latency(),
        dense=export(program, folder / "dense.onnx"), samples=[x], folder=folder, options={"allocation": "uniform"},
    )  # fmt: skip


@pytest.mark.parametrize("busy", [(), (0,), (1,), (2,), (0, 1), (1, 3), (1, 2, 3)], ids=str)
def test_schedules_that_other_load_disturbed_are_taken_again(wide, busy, tmp_path, monkeypatch):
    """A disturbed file seemed to be at the limit, and the search ended with one a quarter below it."""
    clock, told = Clock(*busy), list[str]()
    monkeypatch.setattr(budgets, "timed_in_turns", clock)
    mine = dataclasses.replace(wide, folder=tmp_path, key="busy", say=told.append)
    met = meet(mine)
    share = wide.make(met.plan, tmp_path / "chosen.onnx").size_bytes / wide.dense.size_bytes
    assert 0.975 * 0.5 <= share <= 0.5, told
    assert met.chosen.measured["latency"] == pytest.approx(share, rel=1e-3)
    assert any("other load disturbed it" in line for line in told) == (0 in busy or len(busy) == TRIES)

    def never(plan, path):
        raise AssertionError("made again")

    taken = clock.number
    assert meet(dataclasses.replace(mine, make=never)).rounds == met.rounds  # as a run that goes on reads it
    assert clock.number == taken


def test_load_that_stays_ends_a_search_too(wide, tmp_path, monkeypatch):
    """No schedule is calm after the first one: the calmest of three counts, and no file is timed for ever."""
    clock = Clock(*range(1, 1000))
    monkeypatch.setattr(budgets, "timed_in_turns", clock)
    met = meet(dataclasses.replace(wide, folder=tmp_path, key="always"))
    assert met.chosen.measured["latency"] <= 0.5
    assert clock.number < 6 * TRIES * wide.rounds


def test_without_a_layer_that_is_timed_alone_latency_follows_the_counts(search, tmp_path):
    """Else the table is the same for every plan, and the least that floor and alignment allow would be taken at once."""
    mine = dataclasses.replace(search, asked={"latency": 0.7}, table=Latency(), folder=tmp_path)
    lines = mine.lines([Round(number=0, plan=None, foreseen={}, measured={"latency": 1.0}, holds=False)])
    plan, least = mine.allocated(lines, {"latency": 0.7})
    assert not least and plan.made_by["reached"]["macs"] == pytest.approx(0.7 * search.cost.macs, rel=0.1)


def test_memory_is_that_of_a_process(search, tmp_path):
    met = meet(dataclasses.replace(search, asked={"peak_ram_bytes": 2e9}, folder=tmp_path))
    assert met.already_met
    assert 10e6 < met.chosen.measured["peak_ram_bytes"] < 2e9


def test_limits_that_are_none_are_refused(search):
    for asked in ({}, {"colour": 1.0}):
        with pytest.raises(UsageError, match="must be given limits among"):
            meet(dataclasses.replace(search, asked=asked))
    with pytest.raises(UsageError, match="must come with a table"):
        meet(dataclasses.replace(search, asked={"latency": 0.5}))
