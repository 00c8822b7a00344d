"""Pictures of masks: exact cells for small weights, shares for large ones, files that open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paredown as pare
from paredown.errors import UsageError
from paredown.granularity import Granularity
from paredown.plan import Mask
from paredown.report import mask_picture
from paredown.report.pictures import shades

pytest.importorskip("matplotlib")


def mask(text: str, shape: tuple[int, ...]) -> Mask:
    cut, values = Granularity.parse(text), np.random.default_rng(0).random(shape)
    if cut.kind == "n:m":
        return Mask.of(cut.keep_n_of_m(values), text)
    cells = cut.reduce(values)
    return Mask.of(cut.expand(cells >= np.median(cells), shape), text)


@pytest.mark.parametrize("text", ["element", "2:4", "row", "column", "kernel", "4x4", "3x2"])
@pytest.mark.parametrize("shape", [(12, 16), (8, 4, 3, 3), (6, 8, 5)])
def test_small_weights_are_drawn_cell_by_cell(text: str, shape: tuple[int, ...]) -> None:
    drawn = mask(text, shape)
    figure = mask_picture(drawn)
    (axes,) = figure.axes
    picture = np.asarray(axes.images[0].get_array())
    kept = drawn.kept
    if text == "2:4" and len(shape) > 2:  # inputs stand together
        kept = kept.transpose(0, *range(2, len(shape)), 1)
        assert (picture.reshape(shape[0], -1, 4).sum(-1) == 2).all()
    assert np.array_equal(picture, kept.reshape(shape[0], -1).astype(float))
    assert axes.get_title() == f"{text}: {100 * drawn.density:.3g} % kept"


def test_large_weights_are_drawn_in_blocks_whose_shade_is_the_share() -> None:
    kept = np.random.default_rng(0).random((300, 1000)) < 0.3
    picture, step = shades(kept, "element", most=128)
    assert step == (3, 8) and picture.shape == (100, 125)
    assert picture[7, 11] == pytest.approx(kept[21:24, 88:96].mean()) and picture.mean() == pytest.approx(kept.mean())
    uneven, step = shades(kept[:299, :997], "element", most=128)
    assert uneven[-1, -1] == pytest.approx(kept[297:299, 992:997].mean())
    title = mask_picture(Mask.of(kept, "element")).axes[0].get_title()
    assert "one cell = 3 × 8 weights" in title


def test_one_figure_for_several_and_files(tmp_path: Path) -> None:
    named = {f"conv {text}": mask(text, (8, 4, 3, 3)) for text in ("element", "2:4", "row", "4x4")}
    figure = mask_picture(named)
    assert len(figure.axes) == 4 and figure.axes[2].get_title().startswith("conv row\nrow: 50 %")
    figure.savefig(tmp_path / "m.svg")
    figure.savefig(tmp_path / "m.png", dpi=50)
    assert (tmp_path / "m.svg").read_text().lstrip().startswith("<?xml")
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_to_draw_is_refused() -> None:
    for bad in ({}, Mask.of(np.zeros((0, 3), dtype=bool), "element")):
        with pytest.raises(UsageError, match="must have a mask"):
            mask_picture(bad)
    with pytest.raises(UsageError, match="most"):
        mask_picture(mask("row", (4, 4)), most=0)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.skip = nn.ModuleList([Added(8), Added(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for layer in self.skip:
            x = layer(x)
        return self.last(x + self.block(x))


class Added(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


def test_a_pruned_model_is_drawn_in_the_shapes_of_the_dense_one() -> None:
    """The oracle is in the weights: dark cells, in order, are the weights of the small model that are not masked."""
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(2, 4)
    program = pare.capture(net, x)
    keep = {"block.0.weight": {0: (0, 2, 3)}, "block.0.bias": {0: (0, 2, 3)}, "block.2.weight": {1: (0, 2, 3)}}
    masks = {
        "block.2.weight": mask("element", (8, 3)),
        "last.weight": Mask.of(np.eye(3, 8, dtype=bool), "element"),
    }
    small = pare.prune(program, pare.Plan(keep=keep, masks=masks, drop_modules=("skip.1",)))
    figure = mask_picture(small)
    drawn = {axes.get_title().split("\n")[0]: axes for axes in figure.axes}
    assert {n: a.get_title().split("\n")[1].split(":")[0] for n, a in drawn.items()} == {
        "last.weight": "element", "block.0.weight": "channel", "block.2.weight": "channel, element", "skip.1.fc.weight": "layer",
    }  # fmt: skip
    left = {n: p.detach().numpy() for n, p in small.module.named_parameters()}
    for name, axes in drawn.items():
        kept = np.asarray(axes.images[0].get_array()).astype(bool)
        dense = net.get_parameter(name).detach().numpy()
        there = left[name] if name in left else np.zeros((0, 0), np.float32)
        assert np.array_equal(dense[kept], there[there != 0])
        assert kept.shape == dense.shape and not kept.all()


def test_heads_that_leave_are_whole_stripes_of_all_their_weights() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 4, dim_feedforward=8, batch_first=True).eval()
    program = pare.capture(net, torch.randn(2, 5, 16))
    coupling = pare.couple(program)
    plan = pare.allocate(
        coupling,
        pare.score(program, coupling, granularity="head"),
        pare.examine(program),
        pare.Budget(channels=0.5),
        align=1,
    )
    drawn = {a.get_title().split("\n")[0]: a for a in mask_picture(pare.prune(program, plan)).axes}
    picture = np.asarray(drawn["self_attn.in_proj_weight"].images[0].get_array())
    stripes = picture.reshape(3, 4, 4, 16)  # query, key, value; heads; rows of a head
    assert (
        (stripes == stripes[:, :, :1, :1]).all()
        and (stripes[0] == stripes[1]).all()
        and (stripes[0] == stripes[2]).all()
    )
    assert stripes[0, :, 0, 0].sum() == 2
    columns = np.asarray(drawn["self_attn.out_proj.weight"].images[0].get_array()).reshape(16, 4, 4)
    assert np.array_equal(columns[0, :, 0], stripes[0, :, 0, 0])
    assert "head: 50 % kept" in drawn["self_attn.in_proj_weight"].get_title()


def test_pictures_load_no_torch() -> None:
    code = (
        "import sys, numpy as np; from paredown.plan import Mask; from paredown.report import mask_picture\n"
        "mask_picture(Mask.of(np.eye(4, dtype=bool), 'element')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
