"""The same command does not go on with other data: what a run began with is kept, and the difference is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paredown import contents
from paredown.errors import UsageError
from paredown.pipeline import data
from paredown.pipeline.curves import curve
from paredown.recipe import parse_recipe


def folder(at: Path) -> Path:
    (at / "pictures").mkdir(parents=True)
    (at / "labels.csv").write_text("file,weight\na.png,3000\n")
    (at / "pictures" / "a.png").write_bytes(b"one")
    return at


def test_contents_are_those_of_every_file(tmp_path: Path) -> None:
    given, out = folder(tmp_path / "data"), tmp_path / "run"
    (out / "steps").mkdir(parents=True)
    assert data.changed(out, given) == ""  # nothing on record: a folder from before
    data.remember(out, given)
    assert data.changed(out, given) == "" and set(contents.contents(given)) == {"labels.csv", "pictures/a.png"}
    before = contents.digest_of(given)
    os.utime(given / "labels.csv", (1, 1))
    assert data.changed(out, given) == "" and contents.digest_of(given) == before
    (given / "labels.csv").write_text("file,weight\na.png,4000\n")  # as long as before
    (given / "pictures" / "b.png").write_bytes(b"two")
    told = data.changed(out, given)
    assert "1 new (pictures/b.png)" in told and "1 changed (labels.csv)" in told and contents.digest_of(given) != before
    data.remember(out, given)  # once: the first counts
    assert data.changed(out, given) == told
    (given / "pictures" / "a.png").unlink()
    assert "1 gone (pictures/a.png)" in data.changed(out, given)
    assert data.changed(out, None) == ""


def test_large_data_count_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = folder(tmp_path / "data")
    monkeypatch.setattr(contents, "CONTENTS_BYTES", 4)
    first = contents.contents(given)
    os.utime(given / "labels.csv", (1, 1))
    assert [n for n, told in contents.contents(given).items() if first[n] != told] == ["labels.csv"]


def test_runs_in_the_folder_are_no_data(tmp_path: Path) -> None:
    given = folder(tmp_path / "data")
    (given / "run" / "steps").mkdir(parents=True)
    (given / "run" / "recipe.yaml").write_text("")
    (given / "run" / "records.jsonl").write_text("")
    (given / "__pycache__").mkdir()
    (given / "__pycache__" / "task.pyc").write_bytes(b"")
    assert set(contents.contents(given)) == {"labels.csv", "pictures/a.png"}
    assert list(contents.contents(given / "labels.csv")) == ["labels.csv"]


def test_a_sweep_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    given, out = folder(tmp_path / "data"), tmp_path / "run"
    task = tmp_path / "task.py"
    task.write_text(
        Path(__file__).with_name("curve_task.py").read_text()
        + "\n\ndef calibration_batches(data):\n    return [_moons(64, 4)[0]]\n"
    )
    recipe = parse_recipe(
        {
            "schema": 1, "name": "moons", "task": str(task), "data": str(given),
            "prune": {"align": 4}, "recover": {"epochs": 1}, "base": {"epochs": 1},
            "curve": {"amounts": [0.5], "seeds": [0], "limit": 50.0, "controls": {"kinds": []}},
        }
    )  # fmt: skip
    first = curve(recipe, out=out, quiet=True, processes=1)
    assert [r.to_json() for r in curve(recipe, out=out, quiet=True).records] == [r.to_json() for r in first.records]
    (given / "labels.csv").write_text("file,weight\na.png,3100\n")
    with pytest.raises(UsageError, match=r"(?s)1 changed \(labels.csv\).*--overwrite") as refused:
        curve(recipe, out=out, quiet=True)
    assert str(given) in str(refused.value)
    done = len((out / "journal.jsonl").read_text().splitlines())
    again = curve(recipe, out=out, quiet=True, overwrite=True, processes=1)
    assert len(again.records) == len(first.records)
    assert len((out / "journal.jsonl").read_text().splitlines()) in (done, 2 * done)  # none of the old results counts
    assert not {r.cell["digest"] for r in again.records[1:]} & {r.cell["digest"] for r in first.records[1:]}
    assert curve(recipe, out=out, quiet=True).records  # what it is now is on record
