"""Cells of a weight against loops over single elements, written from the definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from paredown.errors import UsageError
from paredown.granularity import Granularity

SHAPES = st.one_of(
    st.tuples(st.integers(1, 7), st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3)),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)
CELLS = st.one_of(
    st.sampled_from(["element", "row", "column", "kernel"]),
    st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda p: f"{p[0]}x{p[1]}"),
)
RATIOS = st.integers(2, 5).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: f"{n}:{m}"))
FLOATS = st.floats(-4, 4, width=32).map(lambda v: round(v, 2))


def cell_of(text: str, shape: tuple[int, ...], at: tuple[int, ...]) -> tuple[int, ...]:
    """The cell that one element belongs to, by the words of the definition."""
    out, channel, place = at[0], at[1], at[2:]
    column = 0
    for size, index in zip(shape[1:], at[1:], strict=True):
        column = column * size + index
    if text == "element":
        return (out, channel, *place)
    if text == "row":
        return (out,)
    if text == "column":
        return (column,)
    if text == "kernel":
        return (out, channel)
    rows, columns = map(int, text.split("x"))
    return (out // rows, column // columns)


def members(text: str, shape: tuple[int, ...]) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    cells: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for at in itertools.product(*map(range, shape)):
        cells.setdefault(cell_of(text, shape, at), []).append(at)
    return cells


@given(st.data())
def test_reduce_equals_a_loop_over_elements(data: st.DataObject) -> None:
    shape, text = data.draw(SHAPES), data.draw(CELLS)
    how = data.draw(st.sampled_from(["sum", "mean", "max", "l2"]))
    values = data.draw(arrays.arrays(np.float64, shape, elements=FLOATS))
    cut = Granularity.parse(text)
    got = cut.reduce(values, how)
    cells = members(text, shape)
    assert got.shape == cut.grid(shape) and got.size == len(cells)
    if text == "element":  # a cell of one element is its own saliency, whatever the reduction
        assert np.array_equal(got, values)
        return
    for cell, inside in cells.items():
        numbers = [float(values[at]) for at in inside]
        want = {
            "sum": math.fsum(numbers),
            "mean": math.fsum(numbers) / len(numbers),
            "max": max(numbers) if how == "max" else 0.0,
            "l2": math.sqrt(math.fsum(v * v for v in numbers)),
        }[how]
        assert got[cell] == pytest.approx(want, abs=1e-9)


@given(st.data())
def test_expand_and_cell_sizes_equal_a_loop_over_elements(data: st.DataObject) -> None:
    shape, text = data.draw(SHAPES), data.draw(CELLS)
    cut = Granularity.parse(text)
    kept = data.draw(arrays.arrays(np.bool_, cut.grid(shape)))
    full = cut.expand(kept, shape)
    sizes = cut.cell_sizes(shape)
    assert full.shape == shape and full.dtype == np.bool_ and sizes.sum() == math.prod(shape)
    for cell, inside in members(text, shape).items():
        assert sizes[cell] == len(inside)
        for at in inside:
            assert full[at] == kept[cell]


@given(st.data())
def test_n_of_m_equals_a_loop_over_groups_of_inputs(data: st.DataObject) -> None:
    shape, text = data.draw(SHAPES), data.draw(RATIOS)
    scores = data.draw(arrays.arrays(np.float64, shape, elements=st.integers(0, 3).map(float)))  # many ties
    n, m = map(int, text.split(":"))
    kept = Granularity.parse(text).keep_n_of_m(scores)
    for out in range(shape[0]):
        for place in itertools.product(*map(range, shape[2:])):
            for start in range(0, shape[1], m):
                group = range(start, min(start + m, shape[1]))
                ranked = sorted(group, key=lambda c: (scores[(out, c, *place)], c), reverse=True)
                assert {c for c in group if kept[(out, c, *place)]} == set(ranked[:n])


def test_two_of_four_runs_along_input_channels_at_a_fixed_kernel_position() -> None:
    """A kernel of 1 × 4 weights would look like 2:4 in memory order, too: hardware reads inputs."""
    scores = np.zeros((1, 4, 1, 4))
    scores[0, :2] = 1.0  # inputs 0 and 1 matter at all four kernel positions
    kept = Granularity.parse("2:4").keep_n_of_m(scores)
    assert kept[0, :2].all() and not kept[0, 2:].any()
    assert kept.reshape(1, -1).reshape(-1, 4).sum(1).tolist() == [4, 4, 0, 0]  # not 2 of 4 along the kernel


@pytest.mark.parametrize("bad", ["3:2", "2:2", "0:4", "0x4", "4x", "rows", "", "2:4:8", None, 124, -1, "1e3x2", "²:4"])
def test_what_is_no_granularity_is_refused(bad: object) -> None:
    with pytest.raises(UsageError, match="must"):
        Granularity.parse(bad)


@pytest.mark.parametrize("text", ["channel", "head", "layer"])
def test_granularities_that_leave_physically_have_no_mask(text: str) -> None:
    cut = Granularity.parse(text)
    assert not cut.masked
    with pytest.raises(UsageError, match="leaves as a whole"):
        cut.grid((4, 4))


@pytest.mark.parametrize("shape", [(4,), (), (0, 3), (3, 0, 2)])
def test_weights_without_two_axes_or_elements_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="two axes"):
        Granularity.parse("element").grid(shape)


@given(st.data())
def test_holds_equals_a_loop_over_cells(data: st.DataObject) -> None:
    shape, text = data.draw(SHAPES), data.draw(st.one_of(CELLS, RATIOS))
    cut = Granularity.parse(text)
    kept = data.draw(arrays.arrays(np.bool_, shape))
    if data.draw(st.booleans()):  # often whole cells
        kept = cut.keep_n_of_m(kept.astype(float)) if ":" in text else cut.expand(cut.reduce(kept, "max") > 0, shape)
    if ":" in text:
        n, m = map(int, text.split(":"))
        groups: dict[tuple[int, ...], int] = {}
        for at in itertools.product(*map(range, shape)):
            key = (at[0], at[1] // m, *at[2:])
            groups[key] = groups.get(key, 0) + int(kept[at])
        assert cut.holds(kept) == all(count <= n for count in groups.values())
    else:
        cells = members(text, shape).values()
        assert cut.holds(kept) == all(len({bool(kept[at]) for at in inside}) == 1 for inside in cells)
