"""Masks carried out: zeros where they should be, every other bit as it was, and the files beside them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import forked
import paredown as pare
from paredown.errors import NothingToDo, RejectedError, UsageError, VerificationError
from paredown.granularity import Granularity
from paredown.plan import Mask, Plan
from paredown.program import Program, capture
from paredown.prune import compose, load, masks_of, prune, save, take_over


class Shared(nn.Module):
    """One weight in two layers, and one layer run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(self.first(x)).relu()))


def _image(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*layers), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def _nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(3, 8)),
        "conv": _image(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        "grouped": _image(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=4)),
        "depthwise": _image(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        "conv1d": (nn.Sequential(nn.Conv1d(4, 8, 5), nn.GELU(), nn.Conv1d(8, 4, 3)), torch.randn(2, 4, 16)),
        "transposed": _image(nn.ConvTranspose2d(4, 8, 2, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        "shared": (Shared(), torch.randn(3, 8)),
        "half": (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).bfloat16(), torch.randn(3, 8).bfloat16()),
    }


NETS = _nets()
CELLS = ("element", "2:4", "1:4", "row", "column", "kernel", "4x1", "3x2")


@functools.cache
def captured(name: str) -> Program:
    return capture(*NETS[name])


def chosen(net: nn.Module, text: str) -> dict[str, Mask]:
    """About half of the cells of every weight, by magnitude; one mask for a tied weight."""
    cut, masks = Granularity.parse(text), {}
    for name, weight in net.named_parameters():
        if weight.dim() < 2:
            continue
        values = weight.detach().float().abs().numpy()
        if cut.kind == "n:m":
            kept = cut.keep_n_of_m(values)
        else:
            cells = cut.reduce(values)
            kept = cut.expand(cells >= np.median(cells), values.shape)
        masks[name] = Mask.of(kept, text)
    return masks


def by_hand(net: nn.Module, masks: dict[str, Mask]) -> nn.Module:
    """The oracle: the user's own class, multiplied."""
    out = copy.deepcopy(net).eval()
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = out.get_parameter(name)
            parameter.copy_(torch.where(torch.from_numpy(mask.kept), parameter, torch.zeros(())).to(parameter.dtype))
    return out


@pytest.mark.parametrize("realiser", ["module", "graph"])
@pytest.mark.parametrize("text", CELLS)
@pytest.mark.parametrize("name", NETS)
def test_zeros_and_nothing_else(name: str, text: str, realiser: str) -> None:
    net, x = NETS[name]
    before = {n: t.clone() for n, t in net.state_dict().items()}
    masks = chosen(net, text)
    plan = Plan(keep={}, masks=masks)
    if all(m.kept.all() for m in masks.values()):  # 2:4 over two inputs per group prunes nothing
        with pytest.raises(NothingToDo, match="keep all"):
            prune(captured(name), plan)
        return
    small = prune(captured(name), plan, realiser=realiser, condense=False)  # type: ignore[arg-type]
    assert small.realiser == realiser and small.proof.shown == ("masks",)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())  # the user's own is untouched
    state, zeros = small.module.state_dict(), 0
    assert {n for n in state if "lifted" not in n} == set(before)
    for key, tensor in before.items():
        mask = masks.get(key) or (masks["first.weight"] if key == "second.weight" else None)
        kept = torch.from_numpy(mask.kept) if mask else torch.ones(tensor.shape, dtype=torch.bool)
        assert torch.equal(state[key][kept], tensor[kept])
        assert not state[key][~kept].any()
        zeros += 0 if key == "second.weight" else int((~kept).sum())
    assert small.proof.num_zeros == zeros > 0
    assert torch.equal(small.module(x), by_hand(net, masks)(x))
    if name == "shared" and realiser == "module":
        assert small.module.first.weight is small.module.second.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["conv", "grouped", "depthwise", "transposed"])
def test_a_mask_after_a_removal_has_the_shape_that_is_left(name: str) -> None:
    net, x = NETS[name]
    program = capture(net, x)
    coupling = pare.couple(program)
    plan = pare.allocate(
        coupling, pare.score(program, coupling, "l1"), pare.examine(program), pare.Budget(channels=0.5)
    )
    cut = prune(program, plan)
    masks = chosen(cut.module, "element")
    both = prune(program, Plan(keep=plan.keep, masks=masks))
    assert both.proof.shown == ("structure", "masks")
    assert both.proof.max_error <= 1e-4 * both.proof.scale
    assert torch.equal(both.module(x), by_hand(cut.module, masks)(x))
    later = compose(cut, prune(capture(cut.module, x), Plan(keep={}, masks=masks)))
    assert torch.equal(later.module(x), both.module(x))
    assert later.plan.masks == both.plan.masks and later.proof.num_zeros == both.proof.num_zeros
    # A removal after the masks cuts them too, and the zeros stay.
    third = pare.capture(both.module, x)
    coupling = pare.couple(third)
    if not coupling.spaces:
        assert name == "grouped"  # one channel per group is left
        return
    plan = pare.allocate(coupling, pare.score(third, coupling, "l1"), pare.examine(third), pare.Budget(channels=0.7))
    last = compose(both, prune(third, plan))
    assert all(m.shape == tuple(last.module.get_parameter(n).shape) for n, m in last.plan.masks.items())


@pytest.mark.parametrize("text", ["element", "2:4", "row"])
def test_saved_without_a_mask_and_loaded_in_another_process(text: str, tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), torch.randn(3, 8)
    small = prune(capture(net, x), Plan(keep={}, masks=chosen(net, text)))
    save(small, tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert set(file) == set(net.state_dict())
    assert sum(t.numel() for t in file.values()) == sum(p.numel() for p in small.module.parameters())
    (bits,) = tmp_path.glob("masks-*.safetensors")
    assert sum(t.numel() for t in load_file(bits).values()) == sum(
        -(-int(np.prod(m.shape)) // 8) for m in small.plan.masks.values()
    )
    if text != "row":
        assert torch.equal(
            load(tmp_path, nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)))(x), small.module(x)
        )
        return
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; from torch import nn; import paredown as pare\n"
        "net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))\n"
        "x = torch.load(sys.argv[1] + '/x.pt')\n"
        "torch.save(pare.load(sys.argv[1], net)(x), sys.argv[1] + '/y.pt')\n"
    )
    done = forked.run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), small.module(x))


def test_a_file_whose_zeros_came_alive_is_refused(tmp_path: Path) -> None:
    net, x = NETS["linear"]
    small = prune(capture(net, x), Plan(keep={}, masks=chosen(net, "element")))
    save(small, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({n: t + 1 for n, t in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(VerificationError, match=r"masked weights must stay zero. Got 48 of 48 in 0\.weight alive"):
        load(tmp_path, net)


@pytest.mark.parametrize("how", ["gone", "garbage", "other"])
def test_damaged_mask_files_are_refused(how: str, tmp_path: Path) -> None:
    net, x = NETS["linear"]
    save(prune(capture(net, x), Plan(keep={}, masks=chosen(net, "element"))), tmp_path)
    (bits,) = tmp_path.glob("masks-*.safetensors")
    if how == "gone":
        bits.unlink()
    elif how == "garbage":
        bits.write_bytes(b"\xff" * 40)
    else:
        save_file({n: 255 - t for n, t in load_file(bits).items()}, bits)
    with pytest.raises((UsageError, RejectedError), match="mask"):
        load(tmp_path, net)


def test_a_folder_that_is_written_again_holds_one_mask_file(tmp_path: Path) -> None:
    net, x = NETS["linear"]
    for text in ("element", "2:4"):
        save(prune(capture(net, x), Plan(keep={}, masks=chosen(net, text))), tmp_path)
    assert len(list(tmp_path.glob("masks-*.safetensors"))) == 1
    assert torch.equal(load(tmp_path, net)(x), by_hand(net, chosen(net, "2:4"))(x))


def test_masks_that_do_not_fit_are_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.steps = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.steps[0]

    program = capture(Counting(), torch.randn(2, 4))
    half = np.eye(4, dtype=bool)

    def masked(name: str, kept: np.ndarray) -> Plan:
        return Plan(keep={}, masks={name: Mask.of(kept, "element")})

    with pytest.raises(UsageError, match=r"'fc\.weigth'\. Did you mean fc\.weight"):
        prune(program, masked("fc.weigth", half))
    with pytest.raises(UsageError, match=r"shape \(4, 4\).* Got \(4, 3\) for fc\.weight"):
        prune(program, masked("fc.weight", half[:, :3]))
    with pytest.raises(UsageError, match=r"at least one element. Got none for fc\.weight"):
        prune(program, masked("fc.weight", ~np.ones((4, 4), dtype=bool)))
    with pytest.raises(UsageError, match=r"floating-point.*steps, which is torch\.int64"):
        prune(program, masked("steps", half))
    with pytest.raises(NothingToDo, match="keep all"):
        prune(program, masked("fc.weight", np.ones((4, 4), dtype=bool)))
    tied = captured("shared")
    with pytest.raises(UsageError, match="tied weights must have one mask"):
        prune(tied, Plan(keep={}, masks={n: Mask.of(k, "element") for n, k in (
            ("first.weight", np.eye(8, dtype=bool)), ("second.weight", ~np.eye(8, dtype=bool)))}))  # fmt: skip
    norm = captured("conv")
    with pytest.raises(UsageError, match="must name a parameter"):
        prune(norm, masked("1.running_mean", np.eye(8, dtype=bool)[0]))
    with pytest.raises(UsageError, match="booleans"):
        Mask.of(np.zeros((2, 2)), "element")


def test_a_quantized_model_is_refused() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    for act in (lambda: capture(quantized, torch.randn(2, 4)), lambda: take_over(quantized)):
        with pytest.raises((RejectedError, UsageError), match=r"quantized layers: 0|masks of torch"):
            act()


# -------------------------------------------------------------------------------------------------- the user's own masks


def test_own_masks_as_tensors_a_function_and_files(tmp_path: Path) -> None:
    net, x = NETS["conv"]
    program = capture(net, x)
    kept = {"0.weight": net[0].weight.detach().abs() > 0.05}  # type: ignore[index, union-attr]
    save_file({n: k.to(torch.uint8) for n, k in kept.items()}, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", **{n: k.numpy() for n, k in kept.items()})  # type: ignore[arg-type]
    plans = [
        masks_of(program, kept),
        masks_of(program, {n: k.float() for n, k in kept.items()}),
        masks_of(program, lambda name, w: w.abs() > 0.05 if name == "0.weight" else None),
        masks_of(program, tmp_path / "m.safetensors"),
        masks_of(program, str(tmp_path / "m.npz")),
    ]
    plans.append(masks_of(program, {n: k.float().to_sparse() for n, k in kept.items()}))
    assert len({plan.masks["0.weight"].digest for plan in plans}) == 1
    assert torch.equal(prune(program, plans[0]).module(x), by_hand(net, dict(plans[0].masks))(x))
    one_per_filter = torch.tensor([1, 0] * 4).reshape(8, 1, 1, 1)
    spread = masks_of(program, {"0.weight": one_per_filter}, granularity="filter").masks["0.weight"]
    assert spread.granularity == "row" and spread.kept.all(axis=(1, 2, 3)).tolist() == [True, False] * 4


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"0.weight": torch.full((8, 4, 3, 3), 0.5)}, "0 and 1"),
        ({"0.weight": torch.full((8, 4, 3, 3), float("nan"))}, "0 and 1"),
        ({"0.weight": torch.ones(4, 4, 3, 3)}, "shape"),
        ({"0.weight": torch.ones(3)}, "shape"),
        ({"0.wieght": torch.ones(8, 4, 3, 3)}, "Did you mean 0.weight"),
        ({"0.weight": torch.zeros(8, 4, 3, 3)}, "at least one"),
        ({"0.weight": object()}, "0 and 1"),
        ({0: torch.ones(8, 4, 3, 3)}, "must name a parameter.*Got 0"),
        (lambda name, weight: weight.nothing, "AttributeError.*for 0.weight"),
    ],
)
def test_own_masks_that_do_not_fit_are_refused(given: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        masks_of(captured("conv"), given)


def test_own_masks_of_torn_cells_are_refused() -> None:
    program = captured("conv")
    torn = torch.ones(8, 4, 3, 3)
    torn[0, :3] = 0
    masks_of(program, {"0.weight": torn}, granularity="kernel")
    masks_of(
        program,
        {"0.weight": torch.ones(8, 4, 3, 3) * torch.tensor([1, 0, 1, 0]).reshape(1, 4, 1, 1)},
        granularity="2:4",
    )
    for text in ("row", "2:4", "2x1"):
        with pytest.raises(UsageError, match="whole cells"):
            masks_of(program, {"0.weight": torn}, granularity=text)


def test_a_file_with_a_pickle_is_never_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "canary",))  # type: ignore[return-value]

    np.savez(tmp_path / "m.npz", **{"0.weight": np.array([Evil()], dtype=object)})  # type: ignore[arg-type]
    with pytest.raises(RejectedError, match=r"npz"):
        masks_of(captured("conv"), tmp_path / "m.npz")
    assert not (tmp_path / "canary").exists()
    with pytest.raises(RejectedError, match="must be there"):
        masks_of(captured("conv"), tmp_path / "none.safetensors")


def test_masks_of_torch_are_taken_over() -> None:
    net, x = copy.deepcopy(NETS["conv"][0]).eval(), NETS["conv"][1]
    torch_prune.l1_unstructured(net[0], "weight", 0.5)  # type: ignore[index]
    torch_prune.random_unstructured(net[0], "weight", 0.5)  # type: ignore[index]
    torch_prune.ln_structured(net[3], "weight", 0.5, n=2, dim=0)  # type: ignore[index]
    torch_prune.identity(net[3], "bias")  # type: ignore[index]
    net(x).sum().backward()  # the weight is a result of a computation now, which copy.deepcopy refuses
    names = set(net.state_dict())
    want = copy.deepcopy(NETS["conv"][0])
    for at in (0, 3):
        want[at].weight = nn.Parameter(net[at].weight_orig * net[at].weight_mask)  # type: ignore[index, operator]
    plain, plan = take_over(net)
    assert set(plan.masks) == {"0.weight", "3.weight"} and set(net.state_dict()) == names
    assert set(plain.state_dict()) == set(want.state_dict())
    assert torch.equal(plain.eval()(x), want.eval()(x))
    small = prune(capture(plain, x), plan)
    assert torch.equal(small.module(x), want(x)) and small.plan.masks["3.weight"].granularity == "row"
    assert "2 whole rows" in small.notes[1] and "model output" in small.notes[1]  # they cannot leave
    assert small.notes[-1] == "every masked element was zero before: the masks hold what was there"
    assert any("take_over" in note and "0.weight" in note for note in capture(net, x).notes)
    with pytest.raises(UsageError, match="Got one without"):
        take_over(plain)
    rows = torch_prune.ln_structured(copy.deepcopy(NETS["conv"][0]).eval()[0], "weight", 3, n=1, dim=0)  # type: ignore[index]
    whole, plan = take_over(nn.Sequential(rows, nn.ReLU(), nn.Conv2d(8, 2, 1)))
    assert prune(capture(whole, x), plan).module[0].weight.shape == (5, 4, 3, 3)  # type: ignore[index, union-attr]


class _Masked(nn.Module):
    """A mask as people write it by torch.nn.utils.parametrize."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def test_masks_in_parametrizations_are_taken_over() -> None:
    """They were folded, their zeros forgotten: a training revived them."""
    from torch.ao.pruning.sparsifier.utils import FakeSparsity

    net, x = copy.deepcopy(NETS["conv"][0]).eval(), NETS["conv"][1]
    kept = (torch.arange(8 * 4 * 9) % 5 > 0).reshape(8, 4, 3, 3)
    parametrize.register_parametrization(net[0], "weight", _Masked(kept))  # type: ignore[index]
    halves = FakeSparsity((torch.arange(32) % 2).float().reshape(4, 8, 1, 1))
    parametrize.register_parametrization(net[3], "weight", halves)  # type: ignore[index]
    plain, plan = take_over(net)
    assert {n: m.granularity for n, m in plan.masks.items()} == {"0.weight": "element", "3.weight": "column"}
    assert torch.equal(torch.from_numpy(plan.masks["0.weight"].kept), kept)
    assert plan.masks["3.weight"].density == 0.5
    assert torch.equal(plain.eval()(x), net(x)) and not any("parametrizations" in n for n in plain.state_dict())
    assert torch.equal(prune(capture(plain, x), plan).module(x), net(x))


def test_a_parametrization_that_is_no_mask_is_none() -> None:
    net = nn.Linear(4, 4)
    scaled = _Masked(torch.full((4, 4), 0.5))
    parametrize.register_parametrization(net, "weight", scaled)
    with pytest.raises(UsageError, match="Got one without"):
        take_over(net)
