"""Pictures of masks: exact cells for small weights, shares for large ones, files that open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_pictures_load_no_torch() -> None:
    code = (
        "import sys, numpy as np; from paredown.plan import Mask; from paredown.report import mask_picture\n"
        "mask_picture(Mask.of(np.eye(4, dtype=bool), 'element')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
