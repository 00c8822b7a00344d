"""Modules left out: their input in the place of their output, against the user's own code without them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import forked
import paredown as pare
from paredown.errors import RejectedError, UsageError, VerificationError
from paredown.plan import Mask, Plan
from paredown.program import GraphModel, Program, capture
from paredown.prune import compose, depth_candidates, drop_lowest, load, prune, save, score_depth

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width: int = 6, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.act(x + scale * self.norm(self.conv(x)))


class Net(nn.Module):
    """Residual blocks; a run without some of them is one line of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.down = nn.Conv2d(6, 6, 3, 2, 1)
        self.head = nn.Linear(6, 4)

    def run(self, x: Tensor, left_out: tuple[int, ...] = ()) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = x if i in left_out else block(x)
        return self.head(self.down(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Asking(Net):
    """Calls its blocks with a second argument, or reads their attributes: nn.Identity does not fit."""

    def run(self, x: Tensor, left_out: tuple[int, ...] = ()) -> Tensor:
        x = self.stem(x).to(self.blocks[0].conv.weight.dtype)  # type: ignore[union-attr, arg-type]
        for i, block in enumerate(self.blocks):
            x = x if i in left_out else block(x, 0.5)
        return self.head(self.down(x).mean((2, 3)))


class Twice(Net):
    """One block runs three times, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = self.blocks[0]

    def run(self, x: Tensor, left_out: tuple[int, ...] = ()) -> Tensor:
        x = self.stem(x)
        for i in (0, 1, 0, 2):
            x = x if i in left_out else self.blocks[i](x)
        return self.head(self.down(x).mean((2, 3)))


class Encoder(nn.Module):
    """Attention blocks with a mask as second input of the same shape as the stream, a size computed once for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def run(self, x: Tensor, left_out: tuple[int, ...] = ()) -> Tensor:
        positions = torch.ones_like(x)
        for i, layer in enumerate(self.layers):
            x = x if i in left_out else layer(x, positions)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x) + positions).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(found.transpose(1, 2).reshape(b * t, c).view(b, t, c))


def made(kind: type[Any]) -> Any:
    torch.manual_seed(0)
    net = kind()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


def example(kind: type[Any]) -> Tensor:
    return torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1)) if kind is Encoder else X


@functools.cache
def captured(kind: type[Any]) -> tuple[Any, Program]:
    """A net and its program; no test changes either."""
    net = made(kind)
    return net, capture(net, example(kind))


CASES = [
    (Net, ("blocks.0",), (0,), "module"),
    (Net, ("blocks.2", "blocks.1"), (1, 2), "module"),
    (Net, ("blocks.0", "blocks.1", "blocks.2"), (0, 1, 2), "module"),
    (Asking, ("blocks.0",), (0,), "graph"),
    (Asking, ("blocks.1",), (1,), "graph"),
    (Twice, ("blocks.0",), (0, 2), "module"),
    (Twice, ("blocks.1",), (1,), "module"),
    (Encoder, ("layers.0",), (0,), "graph"),
    (Encoder, ("layers.1",), (1,), "graph"),
]


@pytest.mark.parametrize(("kind", "paths", "left_out", "fits"), CASES)
@pytest.mark.parametrize("realiser", ["auto", "graph"])
def test_the_rest_computes_as_if_the_modules_were_not_called(
    kind: type[Any], paths: tuple[str, ...], left_out: tuple[int, ...], fits: str, realiser: Any, tmp_path: Path
) -> None:
    (net, program), x = captured(kind), example(kind)
    before = {n: t.clone() for n, t in made(kind).state_dict().items()}
    small = prune(program, Plan(keep={}, drop_modules=paths), realiser=realiser)
    assert small.realiser == ("graph" if realiser == "graph" else fits)
    assert small.proof.shown == ("depth",) and small.proof.moved > 0
    with torch.no_grad():
        want = net.run(x, left_out)
        assert torch.allclose(small.module(x), want, atol=1e-6) and not torch.allclose(want, net(x), atol=1e-3)
    gone = {n for n in before if n.startswith(tuple(f"{p}." for p in paths))}
    if kind is Twice and "blocks.0" in paths:
        gone |= {n for n in before if n.startswith("blocks.2.")}
    assert set(small.module.state_dict()) == set(before) - gone
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    # It trains (train mode is that of the user's class), and it comes back from its files.
    small.module.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.module.parameters())
    small.module.eval()
    save(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, made(kind))(x), small.module(x))


def test_the_module_realiser_says_why_it_does_not_fit() -> None:
    with pytest.raises(VerificationError, match=r"nn\.Identity in the place of blocks\.0\. Got .*Identity"):
        prune(captured(Asking)[1], Plan(keep={}, drop_modules=("blocks.0",)), realiser="module")


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("blocks.7", r"Did you mean blocks\.\d"),
        ("", "must be one of the model"),
        ("down", r"gives? what it gets in shape.* down: its output has not the shape"),
        ("head", "has not the shape"),
        ("blocks", "must be called by forward"),
    ],
)
def test_modules_that_cannot_be_left_out_are_refused(path: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        prune(captured(Net)[1], Plan(keep={}, drop_modules=(path,)))


def test_a_model_rebuilt_from_graphs_knows_no_modules() -> None:
    first = prune(captured(Net)[1], Plan(keep={}, drop_modules=("blocks.0",)), realiser="graph")
    assert isinstance(first.module, GraphModel)
    program = capture(first.module, X)
    assert depth_candidates(program) == ()
    with pytest.raises(UsageError, match="rebuilt from graphs"):
        prune(program, Plan(keep={}, drop_modules=("blocks.1",)))


def test_depth_then_channels_then_masks_in_one_plan_and_in_levels(tmp_path: Path) -> None:
    _, program = captured(Net)
    shallow = prune(program, Plan(keep={}, drop_modules=("blocks.1",)))
    second = capture(shallow.module, X)
    coupling = pare.couple(second)
    cut = pare.allocate(coupling, pare.score(second, coupling, "l1"), pare.examine(second), pare.Budget(channels=0.5))
    thin = prune(second, cut)
    mask = {"head.weight": Mask.of(np.arange(4 * thin.module.head.weight.shape[1]).reshape(4, -1) % 3 > 0, "element")}  # type: ignore[union-attr, index, operator]
    levels = compose(compose(shallow, thin), prune(capture(thin.module, X), Plan(keep={}, masks=mask)))
    # The plan's indices are those of the dense model; what it says of modules that leave does not matter.
    keep = {**dict(cut.keep), "blocks.1.conv.weight": {0: (0, 1)}}
    once = prune(program, Plan(keep=keep, masks=mask, drop_modules=("blocks.1",)))
    assert once.proof.shown == levels.proof.shown == ("depth", "structure", "masks")
    assert once.proof.num_zeros == levels.proof.num_zeros > 0
    assert torch.equal(once.module(X), levels.module(X))
    for number, small in enumerate((once, levels)):
        save(small, tmp_path / str(number))
        assert torch.equal(load(tmp_path / str(number), made(Net))(X), small.module(X))
    assert levels.plan.drop_modules == ("blocks.1",) and set(levels.plan.masks) == {"head.weight"}
    with pytest.raises((UsageError, RejectedError)):
        load(tmp_path / "0", nn.Linear(2, 2))


def test_channels_then_depth(tmp_path: Path) -> None:
    """The plan of both levels names channels of a module that leaves: carried out at once it gives the same bits."""
    _, program = captured(Net)
    coupling = pare.couple(program)
    plan = pare.allocate(
        coupling, pare.score(program, coupling, "l1"), pare.examine(program), pare.Budget(channels=0.5)
    )
    thin = prune(program, plan)
    both = compose(thin, prune(capture(thin.module, X), Plan(keep={}, drop_modules=("blocks.1",))))
    assert both.proof.shown == ("structure", "depth") and any(n.startswith("blocks.1.") for n in both.plan.keep)
    assert torch.equal(prune(program, both.plan).module(X), both.module(X))
    save(both, tmp_path)
    assert torch.equal(load(tmp_path, made(Net))(X), both.module(X))


def test_a_shallow_model_is_loaded_in_another_process(tmp_path: Path) -> None:
    small = prune(captured(Net)[1], Plan(keep={}, drop_modules=("blocks.1",)))
    save(small, tmp_path)
    torch.save(X, tmp_path / "x.pt")
    code = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_prune_depth import Net; import paredown as pare\n"
        "net = pare.load(sys.argv[1], Net())\n"
        "assert type(net) is Net and type(net.blocks[1]) is torch.nn.Identity\n"
        "torch.save(net(torch.load(sys.argv[1] + '/x.pt')), sys.argv[1] + '/y.pt')\n"
    )
    done = forked.run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), small.module(X))


# ---------------------------------------------------------------------------------------------- candidates and their scores


def test_candidates_are_the_innermost_residual_blocks_with_what_they_cost() -> None:
    net, program = captured(Net)
    found = depth_candidates(program)
    assert [c.path for c in found] == ["blocks.0", "blocks.1", "blocks.2"]
    block = net.blocks[0]
    assert all(c.parameters == sum(p.numel() for p in block.parameters()) for c in found)
    assert all(c.macs == 6 * 6 * 9 * 64 and c.kind == "Block" and c.residual for c in found)
    every = {c.path: c for c in depth_candidates(program, every=True)}
    assert not every["blocks.0.conv"].residual and "down" not in every
    for candidate in found:
        small = prune(program, Plan(keep={}, drop_modules=(candidate.path,)))
        shrunk = pare.examine(capture(small.module, X))
        whole = pare.examine(program)
        assert whole.macs - shrunk.macs == candidate.macs
        assert whole.parameters - shrunk.parameters == candidate.parameters
    shared = {c.path: c for c in depth_candidates(captured(Twice)[1])}
    assert shared["blocks.0"].macs == 3 * shared["blocks.1"].macs


def test_block_influence_is_one_minus_the_mean_cosine_over_channels() -> None:
    net, program = captured(Net)
    batches = [X, X[:2] * 2]
    found = score_depth(program, batches)
    sums = {i: [0.0, 0] for i in range(3)}
    with torch.no_grad():
        for batch in batches:
            x = net.stem(batch)
            for i, block in enumerate(net.blocks):
                y = block(x.clone())
                for sample in range(len(x)):
                    for row in range(8):
                        for column in range(8):
                            a, b = x[sample, :, row, column].double(), y[sample, :, row, column].double()
                            if float(a.norm() * b.norm()) > 0:
                                sums[i][0] += 1 - float(a @ b / (a.norm() * b.norm()))
                            else:  # dark before and after: nothing changed; else at right angles
                                sums[i][0] += float(a.norm() + b.norm() > 0)
                            sums[i][1] += 1
                x = y
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2"]
    for i in range(3):
        assert found[f"blocks.{i}"] == pytest.approx(sums[i][0] / sums[i][1], rel=1e-6)


def test_measured_loss_is_that_of_the_model_without_the_module() -> None:
    for kind in (Net, Asking, Twice, Encoder):
        (net, program), x = captured(kind), example(kind)

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            return model(batch).square().mean()

        before = {n: t.clone() for n, t in made(kind).state_dict().items()}
        found = score_depth(program, [x, x[:2]], by="loss", loss=loss)
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
        assert len(found) >= 2
        for path, score in found.items():
            index = int(path.split(".")[1])
            out = (0, 2) if kind is Twice and index in (0, 2) else (index,)
            with torch.no_grad():
                change = [float(net.run(b, out).square().mean() - net(b).square().mean()) for b in (x, x[:2])]
            assert score == pytest.approx(sum(change) / 2, rel=1e-4, abs=1e-7)


def test_the_lowest_leave_first_and_bad_requests_are_refused() -> None:
    _, program = captured(Net)
    scores = {"blocks.0": 0.2, "blocks.1": 0.1, "blocks.2": 0.1}
    assert drop_lowest(scores, remain=2).drop_modules == ("blocks.2",)
    assert drop_lowest(scores, remain=1).drop_modules == ("blocks.1", "blocks.2")
    for remain in (3, -1):
        with pytest.raises(UsageError, match="remain"):
            drop_lowest(scores, remain=remain)
    with pytest.raises(UsageError, match="loss"):
        score_depth(program, [X], by="loss")
    with pytest.raises(UsageError, match="block_influence"):
        score_depth(program, [X], by="bi")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Did you mean"):
        score_depth(program, [X], modules=["blocks.9"])
    with pytest.raises(RejectedError, match="at least one batch"):
        score_depth(program, [])
    with pytest.raises(RejectedError, match="finite"):
        score_depth(program, [X], by="loss", loss=lambda m, b: m(b).sum() * float("nan"))
