from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from paredown.errors import RejectedError
from paredown.plan import Plan
from paredown.weights import load_into, read_weights


def made(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


@pytest.fixture
def net():
    return made(1)


@pytest.fixture
def other():
    return made(2).state_dict()


def copies(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_values_arrive_and_are_copies(net, other):
    assert not torch.equal(net[0].weight, other["0.weight"])
    report = load_into(net, other)
    assert (report.num_tensors, report.prefix, report.missing, report.unexpected, report.casts) == (7, "", (), (), ())
    assert same(net.state_dict(), other)
    other["0.weight"].zero_()
    assert net[0].weight.abs().max() > 0


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema.module."])
def test_fault_18_a_prefix_is_offered_and_applied_only_when_asked(net, other, prefix):
    before = copies(net)
    wrapped = {prefix + n: t for n, t in other.items()}
    shown = prefix.replace(".", "[.]")
    with pytest.raises(RejectedError, match=rf"(?s){shown}0.weight → 0.weight.*--strip-prefix {shown}"):
        load_into(net, wrapped)
    assert same(net.state_dict(), before)
    assert load_into(net, wrapped, strip_prefix=prefix).prefix == prefix
    assert same(net.state_dict(), other)
    load_into(net, {n: t + 1 for n, t in wrapped.items()}, strip_prefix=True)
    assert torch.equal(net[0].weight, other["0.weight"] + 1)
    assert load_into(net, other, strip_prefix=True).prefix == ""


def test_of_two_copies_one_must_be_named(net, other):
    both = {**{f"model.{n}": t for n, t in other.items()}, **{f"ema.{n}": t + 1 for n, t in other.items()}}
    with pytest.raises(RejectedError, match=r"--strip-prefix ema\..*--strip-prefix model\."):
        load_into(net, both, strip_prefix=True)
    report = load_into(net, both, strip_prefix="ema.")
    assert torch.equal(net[0].weight, other["0.weight"] + 1)
    assert "left out: model.0.weight" in report.notes[-1]
    with pytest.raises(RejectedError, match="must begin a name"):
        load_into(net, both, strip_prefix="student.")


def test_a_prefix_that_the_weights_lack():
    net = nn.ModuleDict({"backbone": nn.Linear(2, 1)})
    weights = nn.Linear(2, 1).state_dict()
    with pytest.raises(RejectedError, match=r"weight → backbone.weight.*--strip-prefix \+backbone\."):
        load_into(net, weights)
    load_into(net, weights, strip_prefix="+backbone.")
    assert torch.equal(net["backbone"].weight, weights["weight"])


def test_fault_19_what_does_not_fit_is_a_table_of_ten_rows(net, other):
    before = copies(net)
    changed = {("9.weight" if n == "0.weight" else n): t for n, t in other.items()}
    rows = r"(?s)1 missing, 1 unexpected.*missing +0\.weight +model \[8, 3, 3, 3\].*unexpected +9\.weight"
    with pytest.raises(RejectedError, match=rows):
        load_into(net, changed)
    assert same(net.state_dict(), before)
    report = load_into(net, changed, strict=False)
    assert (report.missing, report.unexpected, report.num_tensors) == (("0.weight",), ("9.weight",), 6)
    assert torch.equal(net[0].bias, other["0.bias"])
    assert torch.equal(net[0].weight, before["0.weight"])
    many = nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)])
    with pytest.raises(RejectedError, match="and 31 more") as raised:
        load_into(many, {"x": torch.ones(1)})
    assert str(raised.value).count("\n  missing") == 10


def test_nothing_that_fits_is_an_error_also_when_not_strict(net):
    with pytest.raises(RejectedError, match="6 missing"):
        load_into(net, {"x": torch.ones(1)}, strict=False)


def test_batch_counters_may_be_missing(net, other):
    load_into(net, {n: t for n, t in other.items() if "num_batches" not in n})
    assert all(torch.equal(t, other[n]) for n, t in net.state_dict().items() if "num_batches" not in n)


def test_fault_20_a_pruned_model_is_recognised(net, other, tmp_path):
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    rows = r"(?s)model \[8, 3, 3, 3\], weights \[4, 3, 3, 3\].*Layers that differ: 0, 1.*pruned"
    with pytest.raises(RejectedError, match=rows):
        load_into(net, small)
    with pytest.raises(RejectedError, match="6 of another size"):
        load_into(net, small, strict=False)
    save_file(small, tmp_path / "model.safetensors")
    (tmp_path / "plan.json").write_text(Plan(keep={"0.weight": {0: (0, 1, 2, 3)}}).to_json())
    (tmp_path / "form.json").write_text("{}")
    with pytest.raises(RejectedError, match=r"paredown run: use pare\.load\("):
        load_into(net, read_weights(tmp_path / "model.safetensors"))


def test_fault_21_casts_that_keep_values_are_made_and_said(net, other):
    half = {n: t.half() for n, t in other.items()}
    assert load_into(net, half).casts == ("float16 → float32: 6 tensors", "float16 → int64: 1 tensors")
    assert net[0].weight.dtype == torch.float32
    assert torch.equal(net[0].weight, other["0.weight"].half().float())
    assert load_into(net, {n: t.double() for n, t in other.items()}).casts[0] == "float64 → float32: 6 tensors"


def test_fault_21_casts_that_lose_are_refused(net, other):
    before = copies(net)
    for bad in (torch.zeros(8, 3, 3, 3, dtype=torch.int8), torch.zeros(8, 3, 3, 3, dtype=torch.complex64)):
        with pytest.raises(RejectedError, match=r"0\.weight \((int8|complex64) into float32\)"):
            load_into(net, {**other, "0.weight": bad})
    assert same(net.state_dict(), before)
    with pytest.raises(RejectedError, match="float32 into float16"):
        load_into(net.half(), other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_25_weights_that_are_not_finite_are_named(net, other, value):
    before = copies(net)
    other["1.running_var"][3] = value
    with pytest.raises(RejectedError, match=r"NaN or infinity in 1\.running_var"):
        load_into(net, other)
    assert same(net.state_dict(), before)


def test_a_buffer_that_is_infinite_on_purpose_stays(other):
    net = made(1)
    mask = torch.triu(torch.full((3, 3), float("-inf")), 1)
    net.register_buffer("mask", mask)
    assert load_into(net, {**other, "mask": mask.clone()}).num_tensors == 8


def test_a_hook_that_fails_leaves_the_model_as_it_was(net, other):
    before = copies(net)

    def fail(module, *_):
        raise ValueError("this hook fails")

    net[1].register_load_state_dict_pre_hook(fail)
    with pytest.raises(RejectedError, match="this hook fails"):
        load_into(net, other)
    assert same(net.state_dict(), before)


class Tied(nn.Module):
    """A language model's: one table reads and writes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_may_be_given_under_one_name(tmp_path):
    saved, net = Tied(), Tied()
    save_model(saved, str(tmp_path / "m.safetensors"))
    weights = read_weights(tmp_path / "m.safetensors")
    assert len(weights) == 1
    report = load_into(net, weights)
    assert torch.equal(net.head.weight, saved.embed.weight)
    assert net.head.weight is net.embed.weight
    assert (report.missing, report.num_tensors) == ((), 1)
    load_into(net, {n: t + 1 for n, t in saved.state_dict().items()})  # under both, equal
    assert torch.equal(net.head.weight, saved.embed.weight + 1)


@pytest.mark.parametrize("strict", [True, False])
def test_tied_weights_that_differ_are_refused(strict):
    net = Tied()
    before = copies(net)
    table = torch.ones(5, 3)
    with pytest.raises(RejectedError, match=r"equal.*embed\.weight and head\.weight.*untied"):
        load_into(net, {"embed.weight": table, "head.weight": table + 1}, strict=strict)
    assert same(net.state_dict(), before)
    load_into(net, {"embed.weight": table, "head.weight": table.double()})
    assert torch.equal(net.head.weight, table)
