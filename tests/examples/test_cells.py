"""The cells example: its archive, its three lists, what is refused, and a short real run."""

import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import paredown as pare
from paredown.cli import main
from paredown.errors import RejectedError, UsageError
from paredown.recipe import load_recipe
from paredown.sweep import grid
from paredown.train import check_roles, task_from_module

FOLDER = Path(__file__).parents[2] / "examples" / "cells"
DATA = Path(__file__).parents[2].parent / "shared" / "data"
shared = pytest.mark.skipif(not (DATA / "bccd.npz").exists(), reason="no shared data here")


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cells_task_of_tests", FOLDER / "task.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


task = loaded()
COUNTS = {"train": (3, 9, 12, 5), "val": (7, 2), "test": (11, 4, 6)}


def drawn(count: int, seed: int) -> bytes:
    """So many discs on a bright ground, as JPEG."""
    random = np.random.default_rng([seed, count])
    image = Image.new("RGB", (160, 120), (225, 225, 220))
    for x, y in random.integers(10, 110, (count, 2)):
        ImageDraw.Draw(image).ellipse((x, y, x + 9, y + 9), fill=(190, 120, 120))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def archive(folder: Path, **changes: object) -> Path:
    """A small archive of the same form; returns its folder."""
    arrays: dict[str, object] = {}
    for seed, (name, counts) in enumerate(COUNTS.items()):
        parts = [drawn(count, seed) for count in counts]
        arrays[f"{name}_jpeg"] = np.frombuffer(b"".join(parts), np.uint8)
        arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, parts)])
        arrays[f"{name}_count"] = np.array(counts, np.float32)
    np.savez(folder / "bccd.npz", **{**arrays, **changes})  # type: ignore[arg-type]
    return folder


def test_each_list_has_its_role_and_pictures_are_halved(tmp_path: Path) -> None:
    archive(tmp_path)
    for role, name in (("train", "train"), ("choose", "val"), ("test", "test")):
        some = task.split(role, tmp_path)
        assert (some.targets.flatten() * 4 + 12).round().int().tolist() == [*COUNTS[name]]
        assert some.pictures.shape == (len(COUNTS[name]), 3, 60, 80)
    whole = np.asarray(Image.open(io.BytesIO(drawn(COUNTS["val"][0], 1))), np.float64)
    wanted = (whole.reshape(60, 2, 80, 2, 3).mean((1, 3)) / 255 - 0.7) / 0.2
    assert task.split("choose", tmp_path).pictures[0].permute(1, 2, 0).numpy() == pytest.approx(wanted, abs=1e-5)
    (calibration,) = task.calibration_batches(tmp_path)
    assert torch.equal(calibration, task.split("choose", tmp_path).pictures)


def test_training_pictures_are_mirrored_and_keep_their_counts(tmp_path: Path) -> None:
    archive(tmp_path)
    torch.manual_seed(0)
    batches = task.train_batches(tmp_path)
    first, second = ([*batches] for _ in range(2))
    assert len(first) == len(batches) == 1
    (x, y), (u, v) = first[0], second[0]
    assert sorted(y.flatten().tolist()) == sorted(v.flatten().tolist()) and not torch.equal(x, u)


def test_the_error_is_in_cells_for_each_picture(tmp_path: Path) -> None:
    archive(tmp_path)
    found = task.evaluate(lambda x: torch.zeros(len(x), 1), task.test_batches(tmp_path))
    assert found["mae"] == pytest.approx([1.0, 8.0, 6.0], abs=1e-5)  # 0 says 12 cells


def test_the_report_can_group_test_pictures_by_their_counts(tmp_path: Path) -> None:
    archive(tmp_path)
    found = task_from_module(task, data=tmp_path)
    assert found.slices is not None
    columns = found.slices()
    assert columns["id"] == ["test 0", "test 1", "test 2"]
    assert columns["count band"] == ["11 to 13", "fewer than 8", "fewer than 8"]  # of 11, 4 and 6
    errors = np.abs(np.array([*columns["target"]])) * task.SPREAD
    assert errors == pytest.approx(found.evaluate(lambda x: torch.zeros(len(x), 1))["mae"])


def test_the_levels_of_the_curve_are_the_talks() -> None:
    cells = grid(load_recipe(FOLDER / "curve.yaml", ["data=null"]))
    (levels,) = {
        tuple(level.channels for level in c.recipe.prune.levels)
        for c in cells
        if (c.kind, c.schedule, c.amount) == ("pruned", "multi-level", 0.5)
    }
    assert levels == pytest.approx((0.75, 2 / 3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val_count": np.array([1.0], np.float32)}, "one count for each"),
        ({"val_count": np.array([1.0, -2.0], np.float32)}, "at least 0"),
        ({"val_count": np.array([1.0, np.nan], np.float32)}, "at least 0"),
        ({"val_offsets": np.array([0, 10**9, 2 * 10**9])}, "ascending"),
        ({"val_offsets": np.array([0, 5, 5])}, "ascending"),
        ({"val_jpeg": np.zeros(90_000, np.uint8)}, "readable JPEG"),
        ({"val_count": np.array([object(), 1])}, "NumPy archive"),
        ({"val_count": np.array([1.0, np.inf])}, r"at least 0. Got \[inf\]"),
        ({"val_count": np.array(["7", "2"])}, "one count for each"),
        ({"val_count": np.array([7j, 2])}, "one count for each"),
        ({"val_offsets": np.array([0.0, 5.0, 9.0])}, "ascending"),
        ({"val_offsets": np.array([5, 0, 9], np.uint64)}, "ascending"),  # whose differences are never below 0
        ({"val_jpeg": np.zeros((90_000, 1), np.uint8)}, "ascending"),
        ({"val_jpeg": np.zeros(90_000, np.uint8)}, "Got UnidentifiedImageError for val 0 at"),
    ],
)
def test_an_archive_that_cannot_be_used_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=said) as raised:
        task.split("choose", archive(tmp_path, **changes))
    assert "bccd.npz" in str(raised.value)


def torn_files(whole: bytes) -> list[tuple[bytes, str]]:
    """(bytes of a file, what it is called in the message)."""
    array, members, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    with zipfile.ZipFile(members, "w") as file:
        for name in COUNTS:
            for part in ("jpeg", "offsets", "count"):
                file.writestr(f"{name}_{part}.npy", b"no array")
    with np.load(io.BytesIO(whole)) as found:
        np.savez_compressed(packed, **found)
    damaged = bytearray(packed.getvalue())
    damaged[120:400] = b"\x55" * 280
    return [
        (b"", "EOFError"),
        (b"no archive", "ValueError"),
        (whole[: len(whole) // 2], "BadZipFile"),
        (array.getvalue(), "TypeError"),
        (members.getvalue(), "TypeError"),
        (bytes(damaged), "error"),
    ]


@pytest.mark.parametrize("number", range(6))
def test_a_torn_archive_is_refused(number: int, tmp_path: Path) -> None:
    file = archive(tmp_path) / "bccd.npz"
    content, called = torn_files(file.read_bytes())[number]
    file.write_bytes(content)
    with pytest.raises(RejectedError, match=rf"NumPy archive with .* Got {called} at .*bccd.npz.* Make it anew"):
        task.split("train", tmp_path)


def test_pictures_of_another_size_no_file_and_no_folder_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    raw = np.frombuffer(file.getvalue(), np.uint8)
    archive(tmp_path, val_jpeg=raw, val_offsets=np.array([0, len(raw)]), val_count=np.array([1.0], np.float32))
    with pytest.raises(RejectedError, match="160×120"):
        task.split("choose", tmp_path)
    for none in (tmp_path / "elsewhere", tmp_path / "bccd.npz"):
        with pytest.raises(RejectedError, match=r"no file at .*Set data to"):
            task.split("choose", none)
    with pytest.raises(UsageError, match="data"):
        task_from_module(task)


@pytest.mark.parametrize("other", ["train", "val"])
def test_a_picture_in_two_lists_is_refused(other: str, tmp_path: Path) -> None:
    """Also where training augments it, so that it never comes as it is."""
    one, more = drawn(4, 7), drawn(13, 7)
    changes: dict[str, object] = {
        "test_jpeg": np.frombuffer(one, np.uint8), "test_offsets": np.array([0, len(one)]), "test_count": np.array([4.0]),
        f"{other}_jpeg": np.frombuffer(more + one, np.uint8), f"{other}_count": np.array([13.0, 4.0]),
        f"{other}_offsets": np.array([0, len(more), len(more + one)]),
    }  # fmt: skip
    with pytest.raises(RejectedError, match=f"as {other} 1 and test 0"):
        task_from_module(task, data=archive(tmp_path, **changes)).train_batches()  # type: ignore[misc]


def test_a_quarter_of_the_filters_leaves_every_layer() -> None:
    program = pare.capture(task.model(0), task.inputs())
    coupling, cost = pare.couple(program), pare.examine(program)
    plan = pare.allocate(coupling, pare.score(program, coupling, "l1"), cost, pare.Budget(channels=0.75), align=4)
    small = pare.prune(program, plan).module
    thinner = {n: tuple(p.shape) for n, p in task.model(0, 12).named_parameters()}
    assert {n: tuple(p.shape) for n, p in small.named_parameters()} == thinner
    assert not coupling.unknown_ops


@shared
def test_the_lists_are_the_sources_own_and_share_no_picture() -> None:
    some = {role: task.split(role, DATA) for role in task.ROLES}
    assert {role: len(s.targets) for role, s in some.items()} == {"train": 205, "choose": 87, "test": 72}
    median, test = some["train"].targets.median(), some["test"].targets
    assert float((test - median).abs().mean()) * 4 == pytest.approx(3.1, abs=0.06)  # by the README of the data
    check_roles(task_from_module(task, data=DATA))


@shared
@pytest.mark.slow
def test_compress_takes_real_pictures_to_an_int8_file(tmp_path: Path) -> None:
    command = [
        "compress",
        str(FOLDER / "cells.yaml"),
        "--set",
        f"data={DATA}",
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    ]
    short = [
        "base.epochs=10",  # after two, all answers are next to 0, where a cosine says nothing
        "recover.epochs=4",
        "dense_twin.enabled=false",
        "measure.seconds=0.5",
        "budget.metric_loss=null",
    ]
    assert main([*command, *(word for each in short for word in ("--set", each))]) == 0
    lines = (tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = {r["cell"]["stage"]: r for r in map(json.loads, lines)}
    dense, small = records["dense"]["measured"], records["int8"]["measured"]
    about = records["insight"]["details"]
    assert {s["column"] for s in about["changed"]["slices"]} == {"count band"} and about["bias"]["files"]
    assert small["bytes"]["value"] < 0.12 * dense["bytes"]["value"] and dense["metric"]["n"] == 72
    assert small["macs"]["value"] == pytest.approx(0.25 * dense["macs"]["value"], rel=0.15)
