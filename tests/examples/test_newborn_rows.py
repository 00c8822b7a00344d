"""The page of the newborn sweep: its rows, what keeps a side, every seed, and what it says where results are missing."""

import csv
import dataclasses
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import paredown as pare
from curve_records import trial
from paredown.examine import examine_onnx
from paredown.export import predictor
from paredown.measure import artifact_at
from paredown.recipe import load_recipe
from paredown.records import Measured, Record, locked
from paredown.sweep import grid

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from newborn import longer, rows, scene, task  # noqa: E402
from talk import case_study, page  # noqa: E402

WIDTHS = {1.0: 8, 0.75: 6, 0.5: 4}
"""Share of the filters that is left → width of a network that has it exactly."""
ERRORS = {
    ("base", "", None): (120.0, 130.0, 128.0),
    ("pruned", "one-shot", 0.75): (115.0, 126.0, 121.0),
    ("pruned", "multi-level", 0.75): (116.0, 124.0, 123.0),
    ("pruned", "multi-level", 0.5): (121.0, 131.5, 128.0),
    ("pruned", "one-shot", 0.5): (140.0, 141.0, 150.0),
    ("scratch", "", 0.5): (125.0, 133.0, 129.0),
}
GRID = {"seeds": [0, 1, 2], "amounts": [0.75, 0.5], "schedules": ["one-shot", "multi-level"], "limit": 10.0,
        "controls": {"kinds": ["scratch"], "amounts": [0.5]}}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Real exported files of the three shapes."""
    folder, made = tmp_path_factory.mktemp("files"), {}
    for share, width in WIDTHS.items():
        net = task.model(0, width).eval()
        for each in net.modules():
            if isinstance(each, nn.BatchNorm2d):
                nn.init.uniform_(each.bias)  # a bias of zeros would not be in the file
        program = pare.capture(net, task.inputs(), train=False)
        made[share] = pare.export(program, folder / f"{width}.onnx").path
    return made


def record_of(place: rows.Place, seed: int, error: float, file: Path) -> Record:
    kind, schedule, amount = place
    made = trial(kind, amount, seed, error + 1, error, schedule=schedule or "one-shot")
    cost = examine_onnx(file)
    counted = {
        n: Measured(value=v, unit="")
        for n, v in (("bytes", file.stat().st_size), ("macs", cost.macs), ("parameters", cost.parameters))
    }
    counted |= {"effective_macs": counted["macs"], "nonzero_parameters": counted["parameters"]}
    training = {"train": [2, 38] if kind == "base" else [1, 38]}
    return dataclasses.replace(
        made, measured={**made.measured, **counted}, details={"file": "model.onnx", "training": training}
    )


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sixty pictures in a folder with labels.csv."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("own")
    pictures, weights, *_ = scene.scenes(60, 64, 3)
    told = ["file,weight,split"]
    for i, (picture, weight) in enumerate(zip(pictures, weights, strict=True)):
        Image.fromarray(picture).save(folder / f"{i}.png")
        told.append(f"{i}.png,{weight:.1f},{('train', 'train', 'train', 'choose', 'test')[i % 5]}")
    (folder / "labels.csv").write_text("\n".join(told) + "\n")
    yield folder


@pytest.fixture
def sweep(tmp_path: Path, files: dict[float, Path], own_pictures: Path) -> Path:
    """A finished sweep as it lies on the disk."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"curve": GRID, "data": str(own_pictures)}))
    for place, errors in ERRORS.items():
        for seed, error in enumerate(errors):
            where = folder / "trials" / f"{'-'.join(map(str, place))}-{seed}"
            where.mkdir(parents=True)
            file = files[place[2] or 1.0]
            (where / "model.onnx").write_bytes(file.read_bytes())
            left = place[2] or 1.0
            levels = [{"channels": left**0.5}] * 2 if place[1] == "multi-level" else [{"channels": left}]
            (where / "recipe.yaml").write_text(yaml.safe_dump({"prune": {"levels": levels if place[2] else []}}))
            (where / "result.json").write_text(record_of(place, seed, error, file).to_json())
    return folder


@pytest.fixture(scope="module")
def costs() -> list[pare.Cost]:
    """Counted networks in the four places of ResNet-50."""
    counted = {
        s: pare.examine(pare.capture(task.model(0, w).eval(), task.inputs(), train=False)) for s, w in WIDTHS.items()
    }
    return [counted[s] for s in (1.0, 0.75, 0.5, 0.5)]


def test_the_four_rows_have_all_columns_and_each_number_is_worked_out_here(
    sweep: Path, files: dict[float, Path]
) -> None:
    found = rows.read_sweep(sweep)
    assert found is not None and not found.missing and found.num_trials == 18
    table = rows.four_rows(found)
    titles = [c.title for c in table.columns]
    dense = files[1.0].stat().st_size
    for row, place in zip(table.rows, rows.ROWS, strict=True):
        told = dict(zip(titles, row, strict=True))
        file, errors = files[place[2] or 1.0], np.array(ERRORS[place])
        macs = examine_onnx(file).macs
        assert told["MB"] == file.stat().st_size / 1e6 and told["MiB"] == file.stat().st_size / 2**20
        assert told["Size remains"] == pytest.approx(file.stat().st_size / dense)
        assert told["GMACs"] == macs / 1e9 and told["GFLOPs, 2 × MACs"] == 2 * macs / 1e9
        assert told["MACs remain"] == pytest.approx(macs / examine_onnx(files[1.0]).macs)
        mae = told["MAE, g"]
        assert isinstance(mae, page.Spread) and mae.value == pytest.approx(errors.mean())
        assert (mae.low, mae.high) == (errors.min(), errors.max())  # of three seeds
        less = told["MAE less dense, g"]
        if place[0] == "base":
            assert less == "–"
        else:
            assert isinstance(less, page.Spread)
            assert less.value == pytest.approx((errors - np.array(ERRORS["base", "", None])).mean())
        assert told["Seeds"] == 3
    assert [r[0] for r in table.rows] == [
        "none",
        "25 % at once",
        "29 %, then 29 % of the rest: 50 % in all",
        "50 % at once",
    ]


def by_hand(width: int) -> dict[int, tuple[int, int]]:
    """(parameters, MACs) of the regressor in its file by how many sides of a weight shrink with the width, batch norms folded."""
    w, sides = [width, width, 2 * width, 4 * width, 8 * width], [32, 32, 16, 8, 4]
    two = two_macs = 0
    biases = width
    for inner, outer, before, after in zip(w, w[1:], sides, sides[1:], strict=False):
        kernels = [9 * inner * outer, 9 * outer * outer] + ([inner * outer] if inner != outer else [])
        assert after == before // (1 if inner == outer else 2)
        two, two_macs = two + sum(kernels), two_macs + sum(kernels) * after**2
        biases += outer * len(kernels)
    head, last = 64 * width**2, 8 * width
    stem = 3 * 25 * width
    return {2: (two + head, two_macs + head), 1: (stem + biases + 2 * last, stem * 32**2 + last), 0: (1, 0)}


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_what_keeps_a_side_is_counted_as_by_hand(share: float, files: dict[float, Path]) -> None:
    found = rows.by_sides(rows.Layers.of_file(files[1.0]), rows.Layers.of_file(files[share]))
    before, after = by_hand(WIDTHS[1.0]), by_hand(WIDTHS[share])
    for sides in (2, 1, 0):
        assert found[sides] == (before[sides][0], after[sides][0], before[sides][1], after[sides][1])
    assert found[2][1] == found[2][0] * share**2 and found[1][3] == found[1][2] * share
    assert sum(f[2] for f in found.values()) == examine_onnx(files[1.0]).macs


def test_networks_of_other_parameters_are_not_compared(files: dict[float, Path]) -> None:
    one = rows.Layers.of_file(files[1.0])
    less = dataclasses.replace(one, shapes={n: s for n, s in one.shapes.items() if n != "stem.weight"})
    with pytest.raises(ValueError, match=r"stem\.weight"):
        rows.by_sides(one, less)


def parts_of(folder: Path, costs: list[pare.Cost]) -> list[dict[str, Any]]:
    parts = rows.twin_parts(rows.read_sweep(folder), case_study.TOLD, costs)
    return [json.loads(json.dumps(dataclasses.asdict(p), allow_nan=False)) for p in parts]


def test_both_questions_are_answered_by_plots_with_every_seed(sweep: Path, costs: list[pare.Cost]) -> None:
    parts = parts_of(sweep, costs)
    half, times, one_shot, levels, together = [p for p in parts if p["kind"] == "figure"]
    assert {"(1 − p)²", "ResNet-50: MACs", "the talk: MB", "the twin: bytes of the file"} <= {
        n for _, n in half["legend"]
    }
    assert times["legend"] == half["legend"]
    for figure, schedule in ((one_shot, "one-shot"), (levels, "multi-level")):
        assert figure["caption"].startswith(schedule)
        assert [n for _, n in figure["legend"]] == ["mean of the seeds", "seed 0", "seed 1", "seed 2"]
        for place, errors in ERRORS.items():
            if place[1] in ("", schedule) and place[0] in ("base", "pruned"):
                assert all(f"{error:.0f}" in figure["markup"] for error in errors)
    assert "the same shape from scratch" in [n for _, n in together["legend"]]
    said = " ".join(p["text"] for p in parts if p["kind"] == "text")
    assert "25 % at once: −5.3 g (−7.0 to −4.0), the error improves" in said
    assert "50 % at once: +17.7 g (+11.0 to +22.0), the error grows" in said
    assert "+0.8 g (+0.0 to +1.5), no difference shows" in said
    assert "with as many more steps: not tested" in said and "sizes of the training set: not tested" in said
    assert "Would a smaller dense network have done as well?" in said and "not finished" not in said.lower()


def test_a_sweep_that_still_runs_says_what_is_missing(sweep: Path, costs: list[pare.Cost]) -> None:
    for name in ("pruned-multi-level-0.5-0", "pruned-multi-level-0.5-1", "pruned-multi-level-0.5-2", "base--None-2"):
        (sweep / "trials" / name / "result.json").unlink()
    parts = parts_of(sweep, costs)
    said = parts[0]["text"]
    assert said.startswith("**Not finished: 14 of 18 trials have a result.**")
    assert "none (base): seeds 2" in said and "50 %, multi-level (pruned): seeds 0, 1, 2" in said
    table = parts[1]
    assert [r[-1] for r in table["rows"]] == [2, 3, None, 3] and all(c is None for c in table["rows"][2][1:])
    assert table["rows"][1][8]["value"] == pytest.approx(-4.5)  # of the two seeds that have both
    (sweep / "trials" / "pruned-one-shot-0.5-1" / "result.json").unlink()
    told = parts_of(sweep, costs)  # other seeds at every point
    assert "Not tested: no dense control" in " ".join(p["text"] for p in told if p["kind"] == "text")
    for path in sweep.glob("trials/pruned*/result.json"):
        path.unlink()
    told = parts_of(sweep, costs)
    assert "No pruned network has a result yet." in " ".join(p["text"] for p in told if p["kind"] == "text")


@pytest.mark.parametrize("quick", [True, False])
def test_without_a_sweep_the_page_runs_it(
    quick: bool, sweep: Path, costs: list[pare.Cost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = [(row[0], 23, 1.0, 1.0, 1.0, row[2], 1.0, 1.0, "–") for row in case_study.TOLD]
    ran: list[Any] = []

    def fake(recipe: Path, *, out: Path, overrides: list[str], quiet: bool) -> None:
        ran.append({c.kind: (c.recipe.base.epochs, c.seed) for c in grid(load_recipe(recipe, overrides))}["base"])
        shutil.copytree(sweep, out)

    monkeypatch.setattr(case_study, "_resnet50", lambda: (costs, counted))
    monkeypatch.setattr(case_study, "curve", fake)
    monkeypatch.setattr(longer, "train_missing", ran.append)
    setting = page.Setting(quick=quick, folder=tmp_path / "work", shared=tmp_path)
    made = case_study.build(setting)
    (table,) = [p for p in made.parts if isinstance(p, page.Table) and p.caption.startswith("The four rows")]
    assert len(table.rows) == 4 and None not in [c for row in table.rows for c in row]
    folder = tmp_path / "work" / "newborn-curve"
    assert ran == [(2, 1) if quick else (None, 4), folder] and ("grams mean little" in made.shortened) == quick
    given = case_study.build(dataclasses.replace(setting, newborn=sweep))
    assert len(ran) == 2 and not given.shortened


def test_the_talks_gflops_are_said_to_be_multiply_adds(costs: list[pare.Cost]) -> None:
    said = case_study._multiply_adds([5.3383, 3.0317, 1.3731, 1.3731], [5.3673, 3.0535, 1.3876, 1.3876])
    assert "are multiply-adds, so 5.37 stands beside 5.34 GMACs" in said and "would be 10.68" in said
    assert "5.367, which explains the difference" in said and "do not explain the pruned rows" in said
    assert "3.02 against 3.05" in said and "is 3.02 and 1.34" in said
    assert "does not explain the difference" in case_study._multiply_adds([5.3] * 4, [5.3] * 4)
    values = 32**2 * 2 * 8 + 32**2 * 8 + 3 * 16**2 * 16 + 3 * 8**2 * 32 + 3 * 4**2 * 64  # of all batch norms at width 8
    assert case_study._with_norms(costs[0]) == costs[0].macs + 2 * values


def test_without_results_a_command_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows.read_sweep(None) is None and rows.read_sweep(tmp_path) is None
    assert longer.main([str(tmp_path)]) == 3 and rows.COMMAND in capsys.readouterr().err
    assert rows.main([str(tmp_path), "--out", str(tmp_path / "page.html")], say=lambda line: None) == 3
    assert not (tmp_path / "page.html").exists()


def test_of_two_results_at_one_place_the_later_one_counts(sweep: Path, files: dict[float, Path]) -> None:
    place = sweep / "trials" / "of-another-version"
    place.mkdir()
    (place / "result.json").write_text(record_of(("pruned", "one-shot", 0.75), 1, 99.0, files[0.75]).to_json())
    found = rows.read_sweep(sweep)
    assert found is not None
    assert [r.measured["metric"].value for r in found.at(("pruned", "one-shot", 0.75))] == [115.0, 99.0, 121.0]


def test_controls_that_the_sweet_spot_got_of_another_way_are_no_rows(sweep: Path, files: dict[float, Path]) -> None:
    asked = yaml.safe_load((sweep / "recipe.yaml").read_text())
    asked["curve"]["controls"]["amounts"] = ["sweet-spot", 0.5]
    (sweep / "recipe.yaml").write_text(yaml.safe_dump(asked))
    before = rows.read_sweep(sweep)
    place = sweep / "trials" / "of-the-sweet-spot"
    place.mkdir()
    (place / "result.json").write_text(record_of(("scratch", "multi-level", 0.5), 1, 99.0, files[0.5]).to_json())
    after = rows.read_sweep(sweep)
    assert before is not None and after is not None
    assert after.at(("scratch", "", 0.5)) == before.at(("scratch", "", 0.5)) != []
    assert after.num_trials == before.num_trials == 3 * (1 + 4 + 1)


def test_the_csv_has_every_trial(sweep: Path) -> None:
    found = rows.read_sweep(sweep)
    assert found is not None
    lines = [*csv.DictReader(io.StringIO(rows.table_of_trials(found)))]
    assert len(lines) == 18 and {(r["kind"], r["seed"]) for r in lines} >= {("base", "2"), ("scratch", "0")}
    wanted = {"kind": "pruned", "schedule": "one-shot", "remains": "0.75", "seed": "1"}
    (one,) = [r for r in lines if wanted.items() <= r.items()]
    assert float(one["mae_test_g"]) == 126.0 and int(one["flops"]) == 2 * int(one["macs"])


@pytest.mark.slow
def test_the_page_is_made_by_one_command_and_stands_alone(sweep: Path, tmp_path: Path) -> None:
    said: list[str] = []
    before = sorted(sweep.rglob("*"))
    assert rows.main([str(sweep), "--out", str(tmp_path / "page.html")], say=said.append) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|@import|url\(|https?://", text) and len(text) < 1e6
    assert text.count('<svg class="chart"') == 5 and "18 of 18 trials" in said[0]
    assert sorted(sweep.rglob("*")) == before and (tmp_path / "page.csv").is_file()


def test_the_training_error_is_that_of_the_file_and_of_no_other_pictures(
    files: dict[float, Path], own_pictures: Path
) -> None:
    predict = predictor(artifact_at(files[1.0]))
    errors = {}
    for role in ("train", "test"):
        some = task.split(role, own_pictures)
        errors[role] = float((predict(task.normalised(some.pictures)) - some.targets).abs().mean()) * 500
    assert rows.training_error(files[1.0], errors["test"], own_pictures) == pytest.approx(errors["train"], rel=1e-5)
    assert rows.training_error(files[1.0], errors["test"] + 1, own_pictures) is None
    assert errors["train"] != pytest.approx(errors["test"])


def test_dense_networks_are_trained_on_as_long_and_taken_up(
    sweep: Path, own_pictures: Path, costs: list[pare.Cost]
) -> None:
    from safetensors.torch import save_file

    recover = {"epochs": 1, "optimizer": "adamw", "lr": 0.001, "weight_decay": 1e-4, "schedule": "cosine"}
    (sweep / "recipe.yaml").write_text(
        yaml.safe_dump({"curve": {**GRID, "seeds": [0]}, "data": str(own_pictures), "recover": recover})
    )
    steps = sweep / "trials" / "base--None-0" / "steps"
    steps.mkdir()
    dense = task.model(0)
    save_file(dense.state_dict(), steps / "base-trained.safetensors")
    assert longer.main([str(sweep)]) == 0
    place = rows.longer_folder(sweep) / "seed-0"
    record = Record.from_json((place / "result.json").read_text())
    predict, some = predictor(artifact_at(place / "model.onnx")), task.split("test", own_pictures)
    again = float((predict(task.normalised(some.pictures)) - some.targets).abs().mean()) * 500
    assert record.measured["metric"].value == pytest.approx(again, rel=1e-5)
    fresh = float((dense.eval()(task.normalised(some.pictures)).detach() - some.targets).abs().mean()) * 500
    assert again != pytest.approx(fresh)  # it was trained
    kept = (place / "result.json").stat().st_mtime_ns
    assert longer.main([str(sweep)]) == 0 and (place / "result.json").stat().st_mtime_ns == kept
    found = rows.read_sweep(sweep)
    assert found is not None and len(found.at(("longer", "", None))) == 1
    parts = parts_of(sweep, costs)
    said = " ".join(p["text"] for p in parts if p["kind"] == "text")
    assert "Against the dense network with as many more" in said and "longer" not in said
    assert [r[0] for p in parts if p["kind"] == "table" and "Gap" in str(p["columns"]) for r in p["rows"]][
        1
    ] == "none, trained as long as the others"
    assert torch.get_num_threads() == 1


def test_where_another_run_trains_the_dense_networks_it_says_so(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "recipe.yaml").write_text(yaml.safe_dump({"curve": GRID, "recover": {}}))
    with locked(rows.longer_folder(sweep) / ".lock", writable="", held=""):
        assert longer.main([str(sweep)]) == 7
    assert "must be free. Another run works there." in capsys.readouterr().err


def test_networks_trained_as_long_in_another_sweep_are_left_out_and_trained_again(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recovery, another dense network, and results that do not say of which they are."""
    recover = {"epochs": 1, "optimizer": "adamw", "lr": 0.001, "weight_decay": 1e-4, "schedule": "cosine"}
    trained = []

    def fake(found: rows.Sweep, record: Record, given: dict[str, Any], place: Path) -> Record:
        trained.append((record.cell["seed"], given["epochs"]))
        cell = {**record.cell, "kind": "longer", "digest": rows.longer_digest(record, given)}
        return dataclasses.replace(record, cell=cell)

    def left() -> int:
        found = rows.read_sweep(sweep)
        assert found is not None
        return len(found.at(("longer", "", None)))

    def asked(epochs: int) -> None:
        told = {"curve": {**GRID, "seeds": [0, 1]}, "recover": {**recover, "epochs": epochs}}
        (sweep / "recipe.yaml").write_text(yaml.safe_dump(told))

    monkeypatch.setattr(longer, "trained_on", fake)
    asked(16)
    assert longer.main([str(sweep)]) == longer.main([str(sweep)]) == 0
    assert trained == [(0, 16), (1, 16)] and left() == 2
    asked(32)
    assert left() == 0 and longer.main([str(sweep)]) == 0
    assert trained[2:] == [(0, 32), (1, 32)] and left() == 2
    base = sweep / "trials" / "base--None-1" / "result.json"
    base.write_text(base.read_text().replace("base-l1-one-shot-None-1", "another"))
    assert left() == 1 and longer.main([str(sweep)]) == 0
    assert trained[4:] == [(1, 32)] and left() == 2
    old = rows.longer_folder(sweep) / "seed-0" / "result.json"
    record = Record.from_json(old.read_text())
    old.write_text(dataclasses.replace(record, cell={**record.cell, "digest": "longer-of-before"}).to_json())
    assert left() == 1 and longer.main([str(sweep)]) == 0
    assert trained[5:] == [(0, 32)] and left() == 2
