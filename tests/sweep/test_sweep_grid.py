"""Grid: how many cells, what is shared, what a cell's recipe says, and what is refused."""

from __future__ import annotations

import itertools
import operator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paredown.errors import UsageError
from paredown.recipe import Recipe, load_recipe, parse_recipe
from paredown.sweep import Cell, grid
from paredown.sweep.grid import controls_of


def recipe(curve: dict[str, Any], **more: Any) -> Recipe:
    return parse_recipe({"schema": 1, "task": "digits", "curve": curve, **more})


def kinds(cells: tuple[Cell, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for cell in cells:
        found[cell.kind] = found.get(cell.kind, 0) + 1
    return found


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.lists(st.sampled_from(["scratch", "thin", "random"]), unique=True),
)
def test_the_number_of_cells(amounts: int, seeds: int, both: bool, controls: list[str]) -> None:
    schedules = ["one-shot", "multi-level"] if both else ["one-shot"]
    given_amounts = [0.9 - 0.2 * i for i in range(amounts)]
    made = recipe(
        {"amounts": given_amounts, "seeds": [*range(seeds)], "schedules": schedules, "controls": {"kinds": controls}}
    )
    cells = grid(made)
    assert len(cells) == seeds * (1 + amounts * (len(schedules) + len(controls)))
    assert len({c.digest for c in cells}) == len(cells)
    before: set[str] = set()
    for cell in cells:  # what a cell needs stands before it
        assert {digest for _, digest in cell.needs} <= before
        before.add(cell.digest)


def test_a_base_is_shared_by_its_seed_and_told_by_what_it_depends_on() -> None:
    one = recipe({"amounts": [0.5], "seeds": [0, 1]}, recover={"epochs": 7}, prune={"criterion": "l2"})
    two = recipe({"amounts": [0.75, 0.25], "seeds": [1]}, recover={"epochs": 1})
    bases = [{c.digest for c in grid(r) if c.kind == "base"} for r in (one, two)]
    assert bases[1] < bases[0]
    other = recipe({"amounts": [0.5], "seeds": [1]}, base={"epochs": 3})
    assert not {c.digest for c in grid(other)} & bases[0]


def test_controls_of_the_sweet_spot_follow_its_own_way_and_are_no_trial_twice() -> None:
    curve = {"amounts": [0.5, 0.25], "seeds": [0, 1], "schedules": ["one-shot", "multi-level"]}
    made = recipe({**curve, "controls": {"amounts": ["sweet-spot", 0.5]}})
    cells = grid(made)
    assert {(c.schedule, c.amount) for c in cells if c.kind in ("scratch", "thin", "random")} == {("one-shot", 0.5)}
    assert made.curve is not None and made.curve.controls.at_sweet_spot == ("scratch", "thin", "random")
    chosen = [c.digest for c in cells if (c.kind, c.schedule, c.amount) == ("pruned", "multi-level", 0.25)]
    found = controls_of(made, cells, chosen, ("thin", "random"))
    assert [(c.kind, c.schedule, c.amount, c.seed) for c in found] == [
        (kind, "multi-level", 0.25, seed) for seed in (0, 1) for kind in ("thin", "random")
    ]
    for cell in found:
        assert set(dict(cell.needs).values()) <= {c.digest for c in cells}
    there = [c.digest for c in cells if (c.kind, c.schedule, c.amount) == ("pruned", "one-shot", 0.5)]
    assert len(there) == 2 and controls_of(made, cells, there, ("scratch", "thin", "random")) == ()
    assert recipe({**curve, "controls": {"amounts": [0.5]}}).curve.controls.at_sweet_spot == ()  # type: ignore[union-attr]
    assert recipe(curve).curve.controls.at_sweet_spot  # type: ignore[union-attr]


@pytest.mark.parametrize("amounts", [["sweet spot"], [0.75], ["0.5"], [True]])
def test_controls_stand_at_amounts_of_the_curve(amounts: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"curve\.controls\.amounts"):
        recipe({"amounts": [0.5], "controls": {"amounts": amounts}})


def test_equal_recipes_give_equal_cells_and_every_key_counts() -> None:
    curve = {"amounts": [0.5], "seeds": [0]}
    plain = {c.digest for c in grid(recipe(curve)) if c.kind != "base"}
    assert plain == {c.digest for c in grid(recipe(curve)) if c.kind != "base"}
    for more in ({"recover": {"epochs": 9}}, {"prune": {"align": 4}}, {"threads": 2}, {"target": "openvino-x86"}):
        assert not plain & {c.digest for c in grid(recipe(curve, **more)) if c.kind != "base"}, more
    assert not plain & {c.digest for c in grid(recipe({**curve, "latency": True}))}


def test_another_checkpoint_under_the_same_name_is_another_base(tmp_path: Path) -> None:
    weights, model = tmp_path / "w.safetensors", tmp_path / "net.py"
    plain = grid(recipe({"amounts": [0.5], "seeds": [0]}))
    for more, file in (({"weights": str(weights)}, weights), ({"model": f"{model}:net"}, model)):
        file.write_bytes(b"one")
        curve = {"amounts": [0.5], "seeds": [0]}
        first, again = grid(recipe(curve, **more)), grid(recipe(curve, **more))
        file.write_bytes(b"two")
        other = grid(recipe(curve, **more))
        assert [c.digest for c in first] == [c.digest for c in again]
        assert not {c.digest for c in first} & {c.digest for c in other}
        assert [c.kind for c in first] == [c.kind for c in plain]


def test_another_measurement_under_the_same_path_makes_other_cells_of_the_same_base(tmp_path: Path) -> None:
    prune = {"allocation": "knapsack", "sensitivity": str(tmp_path)}
    (tmp_path / "records.jsonl").write_text("one")
    first, again = (grid(recipe({"amounts": [0.5], "seeds": [0]}, prune=prune)) for _ in range(2))
    (tmp_path / "records.jsonl").write_text("two")
    other = grid(recipe({"amounts": [0.5], "seeds": [0]}, prune=prune))
    assert [c.digest for c in first] == [c.digest for c in again]
    assert [c.kind for c in first if c.digest in {o.digest for o in other}] == ["base"] and len(first) == 5


def test_a_cells_recipe_is_one_that_compress_runs() -> None:
    made = recipe(
        {"amounts": [0.5], "seeds": [3], "schedules": ["multi-level"], "methods": ["taylor"]}, recover={"epochs": 5}
    )
    cell = next(c for c in grid(made) if c.kind == "pruned")
    assert cell.recipe.curve is None and cell.recipe.seed == 3 and cell.recipe.threads == 1
    assert cell.recipe.prune.criterion == "taylor"
    channels = [level.channels for level in cell.recipe.prune.levels]
    assert len(channels) == 2 and channels[0] is not None
    assert float(channels[0]) ** 2 == pytest.approx(0.5)
    assert [cell.recipe.of_level(level).epochs for level in cell.recipe.prune.levels] == [2, 3]  # 5, as one level has
    assert cell.recipe.recovery_epochs == 5
    again = load_recipe(__import__("yaml").safe_load(cell.recipe.to_yaml()))
    assert again.digest == cell.recipe.digest


def test_linear_levels_are_those_of_the_talk() -> None:
    curve = {"amounts": [0.5], "seeds": [0], "schedules": ["multi-level", "iterative"], "rounds": 4}
    cells = {c.schedule: c.recipe for c in grid(recipe({**curve, "spacing": "linear"})) if c.kind == "pruned"}
    for schedule, left in {"multi-level": [0.75, 0.5], "iterative": [0.875, 0.75, 0.625, 0.5]}.items():
        shares = [float(level.channels or 0) for level in cells[schedule].prune.levels]
        assert list(itertools.accumulate(shares, operator.mul)) == pytest.approx(left), schedule
    masks = recipe({**curve, "schedules": ["iterative"], "spacing": "linear"}, prune={"granularity": "element"})
    made = next(c for c in grid(masks) if c.kind == "pruned").recipe
    assert made.prune.schedule_options == {"rounds": 4, "spacing": "linear"}
    assert recipe(curve).digest == recipe({**curve, "spacing": "geometric"}).digest  # sweeps that are begun go on
    assert recipe(curve).digest != recipe({**curve, "spacing": "linear"}).digest


def test_iterative_is_levels_of_units_and_a_schedule_of_masks() -> None:
    curve = {"amounts": [0.25], "seeds": [0], "schedules": ["iterative"], "rounds": 3, "controls": {"kinds": []}}
    units = next(c for c in grid(recipe(curve)) if c.kind == "pruned").recipe
    masks = next(c for c in grid(recipe(curve, prune={"granularity": "element"})) if c.kind == "pruned").recipe
    assert len(units.prune.levels) == 3 and units.prune.schedule == "one-shot"
    assert len(masks.prune.levels) == 1 and masks.prune.levels[0].density == 0.25
    assert (masks.prune.schedule, masks.prune.schedule_options) == ("iterative", {"rounds": 3})


def test_rounds_of_one_shot_are_those_of_its_cells() -> None:
    given = {"granularity": "element", "criterion": "synflow", "schedule_options": {"rounds": 100}}
    curve = {"amounts": [0.1], "seeds": [0], "schedules": ["one-shot", "multi-level", "from-scratch", "gradual"]}
    cells = {(c.kind, c.schedule): c.recipe.prune for c in grid(recipe(curve, prune=given))}
    for schedule, kind in (("one-shot", "pruned"), ("multi-level", "pruned"), ("from-scratch", "from-scratch")):
        assert cells[(kind, schedule)].schedule_options == {"rounds": 100}, schedule
    assert cells[("pruned", "gradual")].schedule_options == {}
    assert cells[("random", "one-shot")].schedule_options == {"rounds": 100}


def test_options_that_no_schedule_of_the_curve_has_are_refused() -> None:
    curve = {"amounts": [0.5], "seeds": [0]}
    options = {"schedule_options": {"updates": 3}, "granularity": "element"}
    for schedules, prune in ((["one-shot"], {"schedule": "gradual"}), (["gradual"], {"schedule": "one-shot"})):
        with pytest.raises(UsageError, match=r"prune\.schedule_options must be of a schedule of masks that is among"):
            grid(recipe({**curve, "schedules": schedules}, prune={**options, **prune}))
    with pytest.raises(UsageError, match="schedule of masks"):  # channels have none
        grid(recipe(curve, prune={"schedule_options": {"rounds": 3}}))


def test_the_random_control_spreads_as_what_it_stands_beside() -> None:
    curve = {"amounts": [0.5], "seeds": [0], "schedules": ["gradual"]}
    found = {
        c.kind: c.recipe.prune for c in grid(recipe(curve, prune={"granularity": "element", "criterion": "movement"}))
    }
    assert found["pruned"].allocation is None and found["random"].allocation == "erk"


def test_options_of_a_penalty_are_those_of_the_recipes_own() -> None:
    given = {"regularize": "growing", "regularize_options": {"most": 2.0}}
    methods = [{"criterion": "l1"}, {"regularize": "slimming"}]
    cells = grid(recipe({"amounts": [0.5], "seeds": [0], "methods": methods}, prune=given))
    assert [c.recipe.prune.regularize_options for c in cells if c.kind == "pruned"] == [{"most": 2.0}, {}]


def test_controls_follow_the_first_way_that_prunes_a_trained_model() -> None:
    made = recipe(
        {
            "amounts": [0.75, 0.5],
            "seeds": [0],
            "schedules": ["from-scratch", "one-shot"],
            "controls": {"amounts": [0.5]},
        }
    )
    cells = grid(made)
    assert kinds(cells) == {"base": 1, "pruned": 2, "from-scratch": 2, "scratch": 1, "thin": 1, "random": 1}
    by_digest = {c.digest: c for c in cells}
    for cell in cells:
        if cell.kind in ("scratch", "thin"):
            assert by_digest[dict(cell.needs)["pruned"]].name == "l1 one-shot, 0.5 remains, seed 0"
    random = next(c for c in cells if c.kind == "random")
    assert random.recipe.prune.criterion == "random"
    assert [role for role, _ in random.needs] == ["base"]


def test_a_random_criterion_needs_no_random_control() -> None:
    made = recipe({"amounts": [0.5], "seeds": [0], "methods": ["random"]})
    assert "random" not in kinds(grid(made))


@pytest.mark.parametrize(
    ("curve", "more", "said"),
    [
        (None, {}, "must have a section `curve`"),
        ({"amounts": []}, {}, "must hold at least one. Got none: the grid is empty"),
        ({"amounts": [0.5], "seeds": []}, {}, "curve.seeds: must hold at least one|seeds must hold at least one"),
        ({"amounts": [1]}, {}, "the dense model, which is always on the curve"),
        ({"amounts": [1.0]}, {}, "the dense model, which is always on the curve"),
        ({"amounts": [0]}, {}, "Nothing would remain"),
        ({"amounts": [-0.1]}, {}, r"fraction in \(0, 1\)"),
        ({"amounts": ["25%"]}, {}, "Write 25 % as 0.25"),
        ({"amounts": [0.5, 0.5]}, {}, "each cell once. Got 0.5"),
        ({"amounts": [0.5], "seeds": [1, 1]}, {}, "each cell once. Got 1"),
        ({"amounts": [0.5], "methods": ["l1", "l1"]}, {}, "each cell once. Got l1"),
        ({"amounts": [0.5], "methods": ["l1", {"name": "again", "criterion": "l1"}]}, {}, "which do the same"),
        (
            {"amounts": [0.5], "methods": ["l1", {"name": "again", "criterion": "l1"}], "schedules": ["from-scratch"]},
            {},
            "which do the same",
        ),
        (
            {"amounts": [0.5], "by": "channels", "methods": ["l1", {"factorize": "svd"}]},
            {},
            "curve.by must be parameters or macs for low rank. Got 'channels' with svd",
        ),
        ({"amounts": [0.5], "schedules": ["oneshot"]}, {}, "Did you mean 'one-shot'"),
        ({"amounts": [0.5], "controls": {"kinds": ["thick"]}}, {}, "Did you mean 'thin'"),
        ({"amounts": [0.5], "controls": {"amounts": [0.4]}}, {}, "must be among curve.amounts"),
        ({"amounts": [0.5], "limit": "1 %"}, {}, "in the metric's own unit"),
        ({"amounts": [0.5], "limit": -1}, {}, "greater than or equal to 0"),
        ({"amounts": [0.5], "axis": "latency"}, {}, "must come with curve.latency: true"),
        ({"amounts": [0.5], "schedules": ["gradual"]}, {}, "where channels leave. Got 'gradual'"),
        ({"amounts": [0.5], "by": "density"}, {}, "channels, parameters or macs. Got 'density'"),
        ({"amounts": [0.5]}, {"prune": {"granularity": "2:4"}}, "a mask other than N:M"),
        ({"amounts": [0.5], "methods": [{"granularity": "diagonal"}]}, {}, "diagonal"),
        ({"amounts": [0.5], "trial": {"memory": "4 bananas"}}, {}, "4 bananas"),
        ({"amounts": [0.5], "trial": {"seconds": 0}}, {}, "greater than 0"),
        ({"amount": [0.5]}, {}, "Did you mean curve.amounts"),
    ],
)  # fmt: skip
def test_what_is_refused(curve: dict[str, Any] | None, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        grid(parse_recipe({"schema": 1, "task": "digits", **({} if curve is None else {"curve": curve}), **more}))


def test_ten_thousand_cells_take_seconds() -> None:
    import time

    start = time.process_time()
    amounts = [round(0.99 - 0.0009 * i, 5) for i in range(1000)]
    cells = grid(recipe({"amounts": amounts, "seeds": [*range(10)], "controls": {"kinds": []}}))
    assert len(cells) == 10_010
    assert time.process_time() - start < 10
