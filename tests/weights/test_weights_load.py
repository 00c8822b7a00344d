from __future__ import annotations

import pytest
import torch
from torch import nn

from paredown.errors import RejectedError
from paredown.plan import Plan
from paredown.weights import fitting_prefixes, load_into


@pytest.fixture
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


@pytest.fixture
def other():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()


def test_values_arrive(net, other):
    assert not torch.equal(net[0].weight, other["0.weight"])
    assert load_into(net, other) == ()
    assert all(torch.equal(t, other[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema.module."])
def test_fault_18_a_prefix_is_offered_and_applied_only_when_asked(net, other, prefix):
    before = net[0].weight.clone()
    wrapped = {prefix + n: t for n, t in other.items()}
    with pytest.raises(RejectedError, match=f"--prefix {prefix.replace('.', '[.]')}"):
        load_into(net, wrapped)
    assert torch.equal(net[0].weight, before)
    load_into(net, wrapped, prefix=prefix)
    assert torch.equal(net[0].weight, other["0.weight"])


def test_two_copies_are_both_offered(net, other):
    both = {**{f"model.{n}": t for n, t in other.items()}, **{f"ema.{n}": t + 1 for n, t in other.items()}}
    with pytest.raises(RejectedError, match=r"(?s)--prefix model\..*--prefix ema\."):
        load_into(net, both)
    load_into(net, both, prefix="ema.")
    assert torch.equal(net[0].weight, other["0.weight"] + 1)


def test_a_prefix_that_the_weights_lack():
    assert fitting_prefixes(["backbone.a", "backbone.b"], ["a", "b"]) == ["+backbone."]
    net = nn.ModuleDict({"backbone": nn.Linear(2, 1)})
    load_into(net, nn.Linear(2, 1).state_dict(), prefix="+backbone.")
    assert fitting_prefixes(["a", "b"], ["x.a", "y.b"]) == []


def test_fault_19_missing_and_unexpected_are_tables(net, other):
    changed = {("9.weight" if n == "0.weight" else n): t for n, t in other.items()}
    with pytest.raises(RejectedError, match=r"(?s)1 missing.*0\.weight \(8, 3, 3, 3\).*1 not in the model.*9\.weight"):
        load_into(net, changed)
    notes = load_into(net, changed, strict=False)
    assert [n.split(":")[0] for n in notes] == ["kept as it was, not in the weights", "not used, not in the model"]
    assert torch.equal(net[0].bias, other["0.bias"])


def test_batch_counters_may_be_missing(net, other):
    load_into(net, {n: t for n, t in other.items() if "num_batches" not in n})


def test_fault_20_a_pruned_model_is_recognised(net, other, tmp_path):
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    with pytest.raises(RejectedError, match=r"(?s)model \(8, 3, 3, 3\), weights \(4, 3, 3, 3\).*pruned already"):
        load_into(net, small)
    (tmp_path / "plan.json").write_text(Plan(keep={"0.weight": {0: (0, 1, 2, 3)}}).to_json())
    with pytest.raises(RejectedError, match=r"plan\.json.*paredown\.load"):
        load_into(net, small, source=tmp_path / "model.safetensors")
    with pytest.raises(RejectedError, match="another shape"):
        load_into(net, small, strict=False)


def test_fault_21_dtypes_are_converted_and_said(net, other):
    half = {n: t.half() if t.is_floating_point() else t for n, t in other.items()}
    assert load_into(net, half) == ("converted 6 tensors from float16 to float32",)
    assert net[0].weight.dtype == torch.float32
    codes = {**other, "0.weight": torch.zeros(8, 3, 3, 3, dtype=torch.int8)}
    with pytest.raises(RejectedError, match="quantized already"):
        load_into(net, codes)
