"""Which cells leave: against sorting, one cell at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from paredown.allocate import select
from paredown.allocate.select import Cells, cut, kept_in_rows, rounded

VALUES = st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.0 + 2**-50, 1.5, 3.0, 1e-300, 1e300])


@st.composite
def layers(draw: Any) -> list[Cells]:
    out = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 12))
        scores = np.array(draw(st.lists(VALUES, min_size=size, max_size=size)))
        saves = draw(st.one_of(st.integers(1, 3), st.lists(st.integers(1, 5), min_size=size, max_size=size)))
        out.append(Cells(scores=scores, saves=saves if isinstance(saves, int) else np.array(saves)))
    return out


def by_sorting(cells: list[Cells], target: int, at_most: bool) -> list[NDArray[np.bool_]]:
    """Python's own sort, then one cell after another; stop where the next would lead away from the target."""
    rows = []
    for number, layer in enumerate(cells):
        for index, score in enumerate(layer.scores.tolist()):
            saves = layer.saves if isinstance(layer.saves, int) else int(layer.saves[index])
            rows.append((score, number, index, saves))
    rows.sort()
    kept = [np.ones(len(layer.scores), dtype=bool) for layer in cells]
    saved = 0
    for _, number, index, saves in rows:
        after = abs(saved + saves - target)
        if after >= abs(saved - target) or (at_most and saved + saves > target):
            break
        kept[number][index] = False
        saved += saves
    return kept


@given(
    cells=layers(), share=st.floats(0, 1), at_most=st.booleans(), few=st.sampled_from([0, 1, 3, 9, 1 << 16]),
    spread=st.sampled_from([0.0, 0.1, 2.5]),
)  # fmt: skip
def test_a_cut_is_what_sorting_gives(cells: list[Cells], share: float, at_most: bool, few: int, spread: float) -> None:
    """Whatever the sample says, also where it is small and its bracket misses the threshold."""
    total = sum(c.total for c in cells)
    target = round(share * total)
    usual = select._FEW, select._SPREAD
    select._FEW, select._SPREAD = few, spread
    try:
        found = cut(cells, target, at_most=at_most)
    finally:
        select._FEW, select._SPREAD = usual
    kept = list(found.kept(cells))
    expected = by_sorting(cells, target, at_most)
    assert [k.tolist() for k in kept] == [k.tolist() for k in expected]
    gone = sum(int((~k).sum()) if isinstance(c.saves, int) and c.saves == 1 else int(np.broadcast_to(c.saves, k.shape)[~k].sum()) for c, k in zip(cells, kept, strict=True))  # fmt: skip
    assert gone == found.saved


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_large_layers_with_many_ties_lose_exactly_the_target(dtype: Any, share: float) -> None:
    generator = np.random.default_rng(0)
    cells = [
        Cells(scores=np.round(generator.normal(size=(300, 1000)) * 8).astype(dtype), saves=1),
        Cells(scores=generator.normal(size=(7, 5, 3, 3)).astype(dtype), saves=1),
    ]
    assert cells[0].scores.size > select._AT_ONCE
    target = round(share * sum(c.scores.size for c in cells))
    kept = list(cut(cells, target).kept(cells))
    assert [k.shape for k in kept] == [c.scores.shape for c in cells]
    assert sum(int((~k).sum()) for k in kept) == target
    flat = np.concatenate([c.scores.ravel().astype(np.float64) for c in cells])
    order = np.argsort(flat, kind="stable")
    expected = np.ones(len(flat), dtype=bool)
    expected[order[:target]] = False
    assert (np.concatenate([k.ravel() for k in kept]) == expected).all()


def test_a_wrong_sample_is_put_right_on_either_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets that lie wholly below or above the threshold, and how often all cells are looked at for it."""
    generator = np.random.default_rng(1)
    cells = [Cells(scores=generator.normal(size=5000).astype(np.float32), saves=1)]
    ranked = np.sort(cells[0].scores)
    seen: list[tuple[float, float]] = []
    between = select._between
    monkeypatch.setattr(
        select, "_between", lambda p, low, high, kind: (seen.append((low, high)), between(p, low, high, kind))[1]
    )
    for low, high in ((-0.5, -0.4), (0.4, 0.5)):
        monkeypatch.setattr(select, "_bracket", lambda *_, bracket=(low, high): bracket)
        seen.clear()
        assert cut(cells, 2500).score == ranked[2500]
        assert len(seen) == 2 and seen[1] == ((high, np.inf) if high < 0 else (-np.inf, low))


def test_a_sample_of_much_spares_the_sorting_of_most() -> None:
    generator = np.random.default_rng(2)
    cells = [
        Cells(scores=generator.gamma(0.3, size=n).astype(np.float32), saves=s) for n, s in ((700_000, 1), (300_000, 9))
    ]
    target = round(0.6 * sum(c.total for c in cells))
    pieces = [p for c in cells for p in c.pieces()]
    low, high = select._bracket(pieces, target, np.float32)
    below, values, saves = select._between(pieces, low, high, np.float32)
    assert below <= target < below + int(saves.sum())
    assert len(values) < 0.06 * 1_000_000
    assert (np.diff(values) >= 0).all()


def test_scales_compare_layers() -> None:
    cells = [Cells(scores=np.array([10.0, 20.0]), saves=1, scale=10.0), Cells(scores=np.array([1.5, 0.5]), saves=1)]
    assert [k.tolist() for k in cut(cells, 2).kept(cells)] == [[False, True], [True, False]]


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.99]),
    data=st.data(),
)
@example(rows=2, columns=1, share=0.99, data=None)
def test_rows_lose_their_own_share(rows: int, columns: int, share: float, data: Any) -> None:
    draw = data.draw if data is not None else lambda _: [1.0] * (rows * columns)
    flat = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5]), min_size=rows * columns, max_size=rows * columns))
    scores = np.array(flat).reshape(rows, columns)
    kept = kept_in_rows(scores, 1, share)
    for row in range(rows):  # a naive loop
        number = min(rounded(share, columns), columns - 1)
        leaves = sorted(range(columns), key=lambda c: (scores[row, c], c))[:number]
        assert kept[row].tolist() == [c not in leaves for c in range(columns)]


def test_rows_of_unequal_cells_come_nearest_by_weights() -> None:
    scores = np.array([[1.0, 2.0, 3.0, 0.5]])
    saves = np.array([[4, 4, 4, 1]])  # a border cell
    assert kept_in_rows(scores, saves, 0.5).tolist() == [[False, True, True, False]]  # 5 of round(6.5) = 6, not 9
    assert kept_in_rows(scores, saves, 0.99).tolist() == [[False, False, True, False]]  # one always stays


@pytest.mark.parametrize(("share", "number", "expected"), [(0.8, 10, 8), (0.5, 3, 2), (0.5, 5, 2), (1 - 0.2, 5, 4), (1 - 0.9, 10, 1), (0.29, 100, 29), (0.07 * 3, 100, 21)])  # fmt: skip
def test_rounding_is_that_of_torch_without_noise(share: float, number: int, expected: int) -> None:
    assert rounded(share, number) == expected
