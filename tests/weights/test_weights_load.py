from __future__ import annotations

import pytest
import torch
from torch import nn

from paredown.errors import RejectedError
from paredown.plan import Plan
from paredown.program import capture
from paredown.prune import Proof, Pruned, save
from paredown.weights import load_into, read_weights


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
    report = load_into(net, other)
    assert (report.num_tensors, report.missing, report.unexpected, report.casts) == (7, (), (), ())
    assert all(torch.equal(t, other[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema.module."])
def test_fault_18_a_prefix_is_offered_and_applied_only_when_asked(net, other, prefix):
    before = net[0].weight.clone()
    wrapped = {prefix + n: t for n, t in other.items()}
    with pytest.raises(RejectedError, match=f"--strip-prefix {prefix.replace('.', '[.]')}"):
        load_into(net, wrapped)
    assert torch.equal(net[0].weight, before)
    load_into(net, wrapped, strip_prefix=prefix)
    assert torch.equal(net[0].weight, other["0.weight"])
    load_into(net, {n: t + 1 for n, t in wrapped.items()}, strip_prefix=True)
    assert torch.equal(net[0].weight, other["0.weight"] + 1)
    load_into(net, other, strip_prefix=True)
    assert torch.equal(net[0].weight, other["0.weight"])


def test_two_copies_are_both_offered(net, other):
    both = {**{f"model.{n}": t for n, t in other.items()}, **{f"ema.{n}": t + 1 for n, t in other.items()}}
    with pytest.raises(RejectedError, match=r"--strip-prefix ema\..*--strip-prefix model\."):
        load_into(net, both, strip_prefix=True)
    load_into(net, both, strip_prefix="ema.")
    assert torch.equal(net[0].weight, other["0.weight"] + 1)


def test_a_prefix_that_the_weights_lack():
    net = nn.ModuleDict({"backbone": nn.Linear(2, 1)})
    load_into(net, nn.Linear(2, 1).state_dict(), strip_prefix="+backbone.")


def test_fault_19_missing_and_unexpected_are_tables(net, other):
    changed = {("9.weight" if n == "0.weight" else n): t for n, t in other.items()}
    with pytest.raises(RejectedError, match=r"(?s)missing +0\.weight .*\[8, 3, 3, 3\].*unexpected +9\.weight"):
        load_into(net, changed)
    report = load_into(net, changed, strict=False)
    assert (report.missing, report.unexpected) == (("0.weight",), ("9.weight",))
    assert torch.equal(net[0].bias, other["0.bias"])


def test_batch_counters_may_be_missing(net, other):
    load_into(net, {n: t for n, t in other.items() if "num_batches" not in n})


def test_fault_20_a_pruned_model_is_recognised(net, tmp_path):
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(RejectedError, match=r"(?s)model \[8, 3, 3, 3\], weights \[4, 3, 3, 3\].*of a pruned model"):
        load_into(net, small.state_dict())
    with pytest.raises(RejectedError, match="of another size"):
        load_into(net, small.state_dict(), strict=False)
    plan = Plan(keep={"0.weight": {0: (0, 1, 2, 3)}})
    save(
        Pruned(
            module=small,
            program=capture(net.eval(), torch.zeros(2, 3, 8, 8), train=False),
            plan=plan,
            realiser="module",
            proof=Proof(max_error=0.0, scale=1.0, moved=1.0, mode="float32"),
        ),
        tmp_path,
    )
    with pytest.raises(RejectedError, match=r"paredown\.load|pare\.load"):
        load_into(net, read_weights(tmp_path / "model.safetensors"))


def test_fault_21_dtypes_are_converted_and_said(net, other):
    half = {n: t.half() if t.is_floating_point() else t for n, t in other.items()}
    assert load_into(net, half).casts == ("float16 → float32: 6 tensors",)
    assert net[0].weight.dtype == torch.float32
    codes = {**other, "0.weight": torch.zeros(8, 3, 3, 3, dtype=torch.int8)}
    with pytest.raises(RejectedError, match="int8 into float32"):
        load_into(net, codes)
