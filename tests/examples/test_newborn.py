"""The newborn case study: its pictures, its weights, its own-folder mode, and ResNet-50 by hand beside what is counted."""

import csv
import importlib.util
import math
import shutil
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import paredown as pare
from paredown.errors import RejectedError
from paredown.models import load_model
from paredown.pipeline.insight import changed
from paredown.train import task_from_module

FOLDER = Path(__file__).parents[2] / "examples" / "newborn"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"newborn_{name}_of_tests", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


scene, task = loaded("scene"), loaded("task")


def test_a_newborn_has_one_picture_and_one_weight_whoever_else_is_drawn() -> None:
    few, many = scene.scenes(3, 32, 7), scene.scenes(5, 32, 7)
    for a, b in zip(few, many, strict=True):
        assert np.array_equal(a, b[:3])
    assert not np.array_equal(few[1], scene.scenes(3, 32, 8)[1])


def test_the_error_that_no_picture_can_beat_is_what_it_says() -> None:
    random = np.random.default_rng(0)
    some = scene.body(random)
    weights = np.array([scene.weight_of(some, random) for _ in range(20_000)])
    assert np.abs(weights - some.expected_weight).mean() == pytest.approx(scene.IRREDUCIBLE_MAE, rel=0.02)
    population = np.array([scene.body(random).expected_weight for _ in range(2000)])
    assert 2800 < population.mean() < 3400 and 400 < population.std() < 700


def test_the_volume_is_that_of_points_thrown_at_the_body() -> None:
    """Monte Carlo in three dimensions, part by part, against the closed forms."""
    some, random = scene.body(np.random.default_rng(3)), np.random.default_rng(0)
    points = random.uniform(-1, 1, (400_000, 3))
    share = ((points**2).sum(1) <= 1).mean() * 8  # of a unit ball
    long, width, depth = some.trunk
    total = share * (some.head / 2) ** 3 + share * long * width * depth / 8
    for length, thick in (some.arm, some.leg):
        box = np.array([thick / 2, thick / 2, length / 2])
        x = points * box
        axis = np.clip(x[:, 2], -(length - thick) / 2, (length - thick) / 2)
        inside = (x[:, 0] ** 2 + x[:, 1] ** 2 + (x[:, 2] - axis) ** 2 <= (thick / 2) ** 2).mean()
        total += 2 * inside * 8 * box.prod()
    assert some.volume == pytest.approx(total, rel=0.01)


def test_the_board_is_as_long_as_it_says_at_every_distance() -> None:
    x, y = (np.mgrid[0:400, 0:400][::-1] - 200) / 8.0
    drawn = scene._board(np.zeros((400, 400, 3)), x, y, 8.0, np.random.default_rng(1))
    area = (drawn.max(2) > 0.1).sum() / 64  # cm²; its dark lines are 0.15
    assert area == pytest.approx(math.prod(scene.BOARD), rel=0.03)


def test_what_is_told_of_a_picture_is_what_it_was_taken_with() -> None:
    pictures, _, _, across, light = scene.scenes(40, 64, 7)
    bright = np.percentile(pictures.reshape(40, -1), 99, axis=1)  # of the white board
    assert np.corrcoef(bright, light)[0, 1] > 0.7
    random = np.random.default_rng([7, 3])
    scene.weight_of(scene.body(random), random)
    assert across[3] == random.uniform(66, 84)


def folder_of(path: Path, rows: list[dict[str, str]], size: int = 40) -> Path:
    from PIL import Image

    pictures, *_ = scene.scenes(len(rows), size, 1)
    for picture, row in zip(pictures, rows, strict=True):
        Image.fromarray(picture).save(path / Path(row["file"]).name)
    with (path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_folder_of_ones_own_is_read_and_subjects_stay_together(tmp_path: Path) -> None:
    rows = [{"file": f"{i}.png", "weight": str(2500 + 10 * i), "subject": f"s{i // 2}"} for i in range(60)]
    found = task_from_module(task, data=folder_of(tmp_path, rows))
    weights = {}
    for role, batches in (
        ("train", found.train_batches),
        ("choose", found.choose_batches),
        ("test", found.test_batches),
    ):
        assert batches is not None
        some = [(x, y) for x, y in batches()]
        assert {tuple(x.shape[1:]) for x, _ in some} == {(3, 64, 64)}
        weights[role] = {round(float(g) * 500 + 3000) for _, y in some for g in y.flatten()}
    assert sum(len(w) for w in weights.values()) == 60
    for a, b in (("train", "test"), ("train", "choose"), ("choose", "test")):
        assert not {(g - 2500) // 20 for g in weights[a]} & {(g - 2500) // 20 for g in weights[b]}


def test_the_report_can_group_the_twins_test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(FOLDER / "scene.py", tmp_path)
    monkeypatch.setattr(task, "__file__", str(tmp_path / "task.py"))
    monkeypatch.setattr(task, "COUNTS", {"test": 30, "choose": 5, "train": 5})
    task._synthetic.cache_clear()
    try:
        found = task_from_module(task)
        assert found.slices is not None
        columns = {name: [*column] for name, column in found.slices().items()}
        errors = found.evaluate(lambda x: torch.zeros(len(x), 1))["mae"]
    finally:
        task._synthetic.cache_clear()
    _, weights, _, across, light = scene.scenes(30, task.SIZE, task.SEED)
    assert columns["id"] == [f"scene {i}" for i in range(30)]
    assert columns["camera distance, cm across"] == across.tolist() and columns["light"] == light.tolist()
    assert np.array(columns["target"]) == pytest.approx((weights - 3000) / 500, abs=1e-6)
    bands = ["below 2500 g", "2500 to 3000 g", "3000 to 3500 g", "3500 to 4000 g", "4000 g and more"]
    assert columns["weight band"] == [bands[int(np.digitize(w, (2500, 3000, 3500, 4000)))] for w in weights]
    groups = changed(errors, errors + 1, columns, "min", "g")["slices"]
    assert {g["column"] for g in groups} == {"weight band", "camera distance, cm across", "light"}


def test_other_columns_of_ones_own_table_are_groups(tmp_path: Path) -> None:
    rows = [
        {"file": f"{i}.png", "weight": str(2400 + 100 * i), "split": ("test", "train", "choose")[i // 20],
         "subject": f"s{i}", "clinic": ("a", " b ", "")[i % 3], "age": str(i / 2), "cuff": "7" if i else "none", "id": "mine"}
        for i in range(50)
    ]  # fmt: skip
    found = task_from_module(task, data=folder_of(tmp_path, rows))
    assert found.slices is not None
    columns = found.slices()
    assert set(columns) == {"clinic", "age", "cuff", "id", "target", "weight band"}
    assert columns["id"] == [f"{i}.png" for i in range(20)]
    assert columns["clinic"][:3] == ["a", "b", "not given"] and columns["age"][:3] == [0, 0.5, 1]
    assert columns["cuff"][:2] == ["none", "7"]
    assert columns["weight band"][0] == "below 2500 g" and columns["weight band"][16] == "4000 g and more"


def relabelled(folder: Path, rows: list[dict[str, str]]) -> Path:
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def rows_of_six() -> list[dict[str, str]]:
    splits = ("train", "choose", "test")
    return [{"file": f"{i}.png", "weight": "3000", "split": splits[i % 3], "subject": f"s{i}"} for i in range(6)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": "3.2"}, "Multiply kilograms by 1000, pounds by"),
        ({"weight": "7.2"}, "Multiply kilograms by 1000, pounds by"),  # 7.2 kg would be a record; 7.2 lb are common
        ({"weight": "heavy"}, "in grams"),
        ({"weight": "3200,5"}, "Write it like 2900.5"),
        ({"weight": "3,200"}, "Write it like 2900.5"),
        ({"weight": "3200 g"}, "Write it like 2900.5"),
        ({"weight": "-3200"}, "Correct the row, or take it out"),
        ({"weight": ""}, "Correct the row, or take it out"),
        ({"split": "validation"}, "train, choose or test.*choose is what others call validation"),
        ({"file": "../0.png"}, "must lie under"),
        ({"file": "nothing.png"}, "must be a picture.*no file for 1 of 6 rows.*'nothing.png'.*relative to"),
        ({"file": "a\\0.png"}, "no file for 1 of 6 rows.*with / between folders"),
        ({"file": "."}, "no file for 1 of 6 rows"),
        ({"file": "x" * 400}, "no file for 1 of 6 rows"),
        (
            {"file": "0.png", "weight": "3100", "split": "train", "subject": "s0"},
            "picture '0.png' must have one weight. Got 3000 g at .*labels.csv:2 and 3100 g",
        ),
        ({"file": ""}, "must name a picture"),
        ({"subject": " s1 "}, "'s1' must have one role. Got choose at .*labels.csv:3 and train"),
        ({"file": "2.png", "subject": ""}, "picture '2.png' must have one role. Got test at .*labels.csv:4 and train"),
        ({"file": "copy.png"}, r"picture 'copy.png' \(equal to '2.png'\) must have one role"),
    ],
)
def test_rows_that_cannot_be_used_are_named(change: dict[str, str], said: str, tmp_path: Path) -> None:
    rows = rows_of_six()
    folder = folder_of(tmp_path, rows)
    shutil.copy(folder / "2.png", folder / "copy.png")
    rows[3] |= change
    with pytest.raises(RejectedError, match=said) as raised:
        task.split("train", relabelled(folder, rows))
    assert "labels.csv:5" in str(raised.value)


def test_fault_51_damaged_pictures_are_counted_named_and_left_out_up_to_a_limit(tmp_path: Path) -> None:
    rows = [
        {"file": f"{i}.png", "weight": str(2500 + i), "split": ("train", "choose", "test")[i % 3]} for i in range(200)
    ]
    folder = folder_of(tmp_path, rows)
    whole = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(whole[: len(whole) // 2])
    (folder / "8.png").write_bytes(b"no picture")
    with pytest.warns(
        UserWarning, match=r"2 of 200 pictures cannot be read and were left out: 7.png \(line 9\), 8.png \(line 10\)$"
    ):
        assert len(task.split("choose", folder).targets) == 66  # of 67
    assert len(task.split("test", folder).targets) == 65  # of 66
    (folder / "9.png").write_bytes(b"")
    task._own.cache_clear()
    with pytest.raises(
        RejectedError, match=r"1% of them may be damaged. Got 3 of 200 that cannot be read at .*labels.csv: 7.png"
    ):
        task.split("train", folder)


def test_one_role_may_have_a_subject_twice_and_a_picture_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    rows = rows_of_six()
    folder = folder_of(tmp_path, rows)
    rows.append({**rows[0], "subject": "s0 "})
    with pytest.warns(UserWarning, match=r"1 of 7 rows repeat a picture and were left out: 0\.png \(line 8\)"):
        assert len(task.split("train", relabelled(folder, rows)).targets) == 2


def test_a_subject_is_one_however_its_accents_are_written(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, f"José {n}") for n in range(40) for form in ("NFC", "NFD")]
    rows = [{"file": f"{i}.png", "weight": "3000", "subject": name} for i, name in enumerate(names)]
    folder = folder_of(tmp_path, rows)
    read = [set(task.split(role, folder).columns["id"]) for role in ("train", "choose", "test")]
    assert all(read) and sum(map(len, read)) == 80
    assert all(
        ({f"{2 * n}.png", f"{2 * n + 1}.png"} <= some) or f"{2 * n}.png" not in some for some in read for n in range(40)
    )
    rows = rows_of_six()
    rows[0]["subject"], rows[2]["subject"] = "José", unicodedata.normalize("NFD", "José")
    (tmp_path / "two").mkdir()
    with pytest.raises(RejectedError, match="the subject 'José' must have one role"):
        task.split("train", folder_of(tmp_path / "two", rows))


@pytest.mark.parametrize("name", ["target", "weight band", "Target"])
def test_a_column_that_the_report_has_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=f"no column may be called '{name}'"):
        task.split("train", folder_of(tmp_path, [{**row, name: "1"} for row in rows_of_six()]))


def test_sixteen_bits_of_a_pgm_are_read_and_what_shines_through_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).round()
    (tmp_path / "deep.pgm").write_bytes(b"P5 64 64 65535\n" + (grey * 257).astype(">u2").tobytes())
    assert np.array_equal(task._read(tmp_path / "deep.pgm", "here")[..., 0], grey.astype(np.uint8))
    for alpha in (255, 254):
        Image.new("RGBA", (64, 64), (10, 20, 30, alpha)).save(tmp_path / f"{alpha}.png")
    assert task._read(tmp_path / "255.png", "here")[0, 0].tolist() == [10, 20, 30]
    with pytest.raises(RejectedError, match=r"pictures must be opaque\. Got a transparent one at here"):
        task._read(tmp_path / "254.png", "here")


@pytest.mark.parametrize("row", [",3000", "1.png", "1.png,"])
def test_a_row_that_ends_early_is_named(row: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [{"file": f"{i}.png", "weight": "3000"} for i in range(2)])
    (folder / "labels.csv").write_text(f"file,weight\n0.png,3000\n{row}\n")
    with pytest.raises(RejectedError, match=r"labels\.csv:3"):
        task.split("train", folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,weight\nJosé.png,3000\n".encode("cp1252"), "in UTF-8"),
        (b"file,weight\n" + b"x" * 200_000 + b",3000\n", "in UTF-8. Got field larger"),
        (b"file;weight\na.png;3000,5\n", "Got file;weight at .*Separate them by commas"),
        ("file,weight\na.png,3000\n".encode("utf-16"), "in UTF-8.*Save it as"),
        (b"file,weight\na\0.png,3000\n", "in UTF-8. Got a byte 0 at"),
        (
            b'file,weight,note\na.png,3000,"open\nb.png,3000,\n',
            "in UTF-8. Got unexpected end",
        ),  # else b.png would be lost
        (b"File,Weight\na.png,3000\n", "columns file and weight.*Got File, Weight at"),
        (
            b"file,weight,Subject\na.png,3000,s1\n",
            "'Subject' must be written subject",
        ),  # else babies would be split apart
        (b"file,weight, split\na.png,3000,test\n", "' split' must be written split"),
        (b"file,weight,weight\na.png,3000,3100\n", "'weight' must be there once"),
        (b"a.png,3000\nb.png,3100\n", "Got a.png, 3000 at .*first line"),
        (b"file,weight\n", "must have rows"),
        (b"", "must have rows"),
        (
            b"file,weight,subject\na.png,3000,5,s1\n",
            r"cell for each of 3 columns. Got 4 at .*labels.csv:2. Put .* quotes",
        ),
        (b"file,weight,subject\na.png,3000\n", r"cell for each of 3 columns. Got 2 at .*labels.csv:2"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(text)
    with pytest.raises(RejectedError, match=said):
        task.split("train", tmp_path)


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dir" / "labels.csv").mkdir(parents=True)
    (tmp_path / "labels.csv").write_text("file,weight\n")
    for data, got in (
        (tmp_path / "none", "no file"),
        (tmp_path / "labels.csv", "no file"),
        (tmp_path / "dir", "no file"),
    ):
        with pytest.raises(RejectedError, match=f"data must be a folder with labels.csv. Got {got} at {data}"):
            task.split("train", data)


def test_lines_are_those_of_the_file_whatever_is_empty_or_goes_over_two(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, rows_of_six())
    text = (folder / "labels.csv").read_text().splitlines()
    text[4] = text[4].replace("3000", "heavy")
    text[2:2] = ["", ",,,"]
    (folder / "labels.csv").write_text("\r\n".join([*text, "", ",,,"]) + "\r\n")
    with pytest.raises(RejectedError, match=r"'heavy' at .*labels\.csv:7\."):
        task.split("train", folder)
    (folder / "labels.csv").write_text("\n".join([*text]).replace("heavy", "3000"), encoding="utf-8-sig")
    task._own.cache_clear()
    assert len(task.split("train", folder).targets) == 2


def test_all_pictures_that_are_not_there_are_told_at_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, rows_of_six())
    for gone in (1, 2, 5):
        (folder / f"{gone}.png").unlink()
    with pytest.raises(RejectedError, match=r"no file for 3 of 6 rows, the first '1.png' at .*labels.csv:3"):
        task.split("train", folder)


def test_a_split_without_pictures_says_what_to_do(tmp_path: Path) -> None:
    rows = [{**row, "split": "", "subject": "one"} for row in rows_of_six()]
    with pytest.raises(RejectedError, match=r"none for .*1 subject.*Fill the column split, or bring more subjects"):
        task.split("train", folder_of(tmp_path, rows))


def test_names_beyond_ascii_in_folders_are_found_composed_or_not(tmp_path: Path) -> None:
    """macOS writes names decomposed; spreadsheets write them composed."""
    rows = rows_of_six()
    folder = folder_of(tmp_path, rows)
    (folder / "नवजात").mkdir()
    for i, row in enumerate(rows):
        composed, apart = f"नवजात/é{i}.png", f"नवजात/e\N{COMBINING ACUTE ACCENT}{i}.png"
        (folder / row["file"]).rename(folder / (apart, composed)[i % 2])
        row["file"] = f" {composed}" if i < 3 else apart
    assert len(task.split("train", relabelled(folder, rows)).targets) == 2


def test_deep_pictures_keep_their_tones_and_floats_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    folder = folder_of(tmp_path, rows_of_six())
    with Image.open(folder / "0.png") as image:
        grey = np.asarray(image.convert("L"))
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.tif")
    Image.fromarray(grey / np.float32(255)).save(folder / "real.tif")
    plain, *deep = (task._read(folder / name, "here") for name in ("grey.png", "deep.png", "deep.tif"))
    assert plain.std() > 10 and all(np.array_equal(plain, each) for each in deep)
    with pytest.raises(RejectedError, match=r"8 or 16 bits.*Got floating point at here"):
        task._read(folder / "real.tif", "here")


def test_a_picture_above_pillows_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    folder = folder_of(tmp_path, rows_of_six())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # half of it has 1600
    with pytest.raises(RejectedError, match=r"DecompressionBombError.*labels\.csv:2"):
        task.split("train", folder)


def test_a_phone_that_was_held_upright_gives_upright_pictures(tmp_path: Path) -> None:
    from PIL import Image

    folder = folder_of(tmp_path, rows_of_six())
    with Image.open(folder / "0.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter to the right
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    straight, turned = (task._read(folder / name, "here") for name in ("0.png", "turned.png"))
    assert np.array_equal(straight, turned)


# ------------------------------------------------------------------------------------------------- ResNet-50 by hand


def by_hand(share: float, size: int = 256, classes: int = 1000) -> tuple[int, int]:
    """(MACs, parameters) of torchvision's ResNet-50 with this share of all its filters, straight from its layer table."""

    def kept(width: int) -> int:
        return round(width * share)

    macs = parameters = 0

    def conv(inner: int, outer: int, kernel: int, side: int) -> None:
        nonlocal macs, parameters
        macs += inner * outer * kernel**2 * side**2
        parameters += inner * outer * kernel**2 + 2 * outer  # a batch norm behind each

    side, stream = size // 2, kept(64)
    conv(3, stream, 7, side)
    side //= 2
    for stage, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            after = side // 2 if stage and not block else side
            conv(stream, kept(planes), 1, side)
            conv(kept(planes), kept(planes), 3, after)
            conv(kept(planes), kept(4 * planes), 1, after)
            if not block:
                conv(stream, kept(4 * planes), 1, after)
            side, stream = after, kept(4 * planes)
    return macs + stream * classes, parameters + stream * classes + classes


def test_resnet50_at_256_is_counted_as_by_hand() -> None:
    cost = pare.examine(
        pare.capture(load_model("torchvision:resnet50")[0].eval(), torch.zeros(2, 3, 256, 256), train=False)
    )
    assert (cost.macs, cost.parameters) == by_hand(1.0)
    assert [round(by_hand(s)[0] / 1e9, 2) for s in (1.0, 0.75, 0.5)] == [5.34, 3.03, 1.37]  # of the talk's table


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_pruned_by_filters_it_has_what_the_closed_form_says(share: float) -> None:
    program = pare.capture(load_model("torchvision:resnet50")[0].eval(), torch.zeros(2, 3, 256, 256))
    coupling, cost = pare.couple(program), pare.examine(program)
    plan = pare.allocate(coupling, pare.score(program, coupling, "l1"), cost, pare.Budget(channels=share), align=1)
    module = pare.prune(program, plan).module
    small = pare.examine(pare.capture(module, torch.zeros(2, 3, 256, 256), train=False))
    assert (small.macs, small.parameters) == by_hand(share)
