"""The book of the talk: its pages against numbers worked out here, and a book that is killed, fails, goes on, and stands alone."""

import ast
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch

import paredown
from paredown.records import Measured, locked

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from talk import (  # noqa: E402
    book,
    examine,
    from_scratch,
    noise,
    page,
    pruning_pictures,
    pruning_recipe,
    redundancy,
    thirteen_models,
    tiles,
    which_zeros,
)

CHEAP = ("cast", "alexnet", "scale_and_zero_point", "glossary", "later")
"""Pages that tests build; the others are marked slow."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("book")


@pytest.fixture(scope="module")
def quick(out: Path) -> page.Setting:
    return page.Setting(quick=True, folder=out, shared=out)


@pytest.fixture(scope="module")
def built(out: Path, quick: page.Setting) -> dict[str, dict[str, Any]]:
    return book.build(CHEAP, quick, out)


def tables(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in result["page"]["parts"] if part["kind"] == "table"]


# --------------------------------------------------------------------------------------------------------- the pages


def test_every_module_of_the_folder_is_a_page_of_the_book_or_serves_pages() -> None:
    serving = {"__init__", "book", "draw", "nets", "page", "timing"}
    assert {p.stem for p in (EXAMPLES / "talk").glob("*.py")} == serving | set(book.PAGES)
    assert len(set(book.PAGES)) == len(book.PAGES) == 20


def test_every_page_has_a_build_and_a_title_of_its_own() -> None:
    titles = []
    for name in book.PAGES:
        tree = ast.parse((EXAMPLES / "talk" / f"{name}.py").read_text(encoding="utf-8"))
        assert [f.name for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "build"] == ["build"], name
        made = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Page"]
        given = {k.arg: k.value for k in made[0].keywords}
        assert {"title", "told", "parts", "differ"} <= given.keys(), name
        titles.append(ast.literal_eval(given["title"]))
    assert len(set(titles)) == len(book.PAGES) and all(titles)


def test_the_thirteen_rows_are_those_of_the_talk() -> None:
    names = "AlexNet VGG-16 VGG-19 ResNet-18 ResNet-50 ResNet-101 ResNet-152 InceptionV3 Xception MobileNetV1 MobileNetV2 EfficientNet-B0 EfficientNet-B7"
    told = (61, 1.0, 16.4, 233, 138, 15.5, 112.3, 528, 144, 19.6, 136.1, 549, 11.7, 1.8, 153.8, 44, 25.6, 4.1, 160.2, 98, 44.6, 7.6, 170.6, 167,
            60.2, 11.3, 187.5, 230, 23.8, 5.7, 239.3, 92, 22.9, 8.4, 366.3, 88, 4.2, 0.57, 135.7, 16, 3.5, 0.3, 85.7, 14, 5.3, 0.39, 73.6, 20,
            66, 37, 560.6, 255)  # fmt: skip
    assert [row[0] for row in thirteen_models.TOLD] == names.split()
    assert [v for row in thirteen_models.TOLD for v in row[3:]] == [*told]
    sides = {row[0]: row[2] for row in thirteen_models.TOLD}
    assert {n for n, s in sides.items() if s != 224} == {"InceptionV3", "Xception", "EfficientNet-B7"}


def resnet18() -> tuple[int, int]:
    """Parameters and MACs of ResNet-18 at 224×224, by hand."""
    parameters, macs = 3 * 64 * 49 + 128, 3 * 64 * 49 * 112**2
    for stage, width in enumerate((64, 128, 256, 512)):
        before, side = (64 if stage == 0 else width // 2), 56 // 2**stage
        convolutions = [(before, width, 9), (width, width, 9), (width, width, 9), (width, width, 9)]
        convolutions += [(before, width, 1)] if stage else []
        parameters += sum(i * o * k + 2 * o for i, o, k in convolutions)
        macs += sum(i * o * k for i, o, k in convolutions) * side**2
    return parameters + 513_000, macs + 512_000


def alexnet_by_hand(widths: tuple[int, ...], sides: tuple[int, ...], size: int) -> tuple[list[int], list[int]]:
    """Parameters and MACs of every layer."""
    kernels, before = (121, 25, 9, 9, 9), (3, *widths[:-1])
    weights = [i * o * k for i, o, k in zip(before, widths, kernels, strict=True)]
    linear = [(widths[-1] * 36, 4096), (4096, 4096), (4096, 1000)]
    parameters = [w + o for w, o in zip(weights, widths, strict=True)] + [i * o + o for i, o in linear]
    assert size in (224, 227)
    return parameters, [w * s**2 for w, s in zip(weights, sides, strict=True)] + [i * o for i, o in linear]


def test_two_of_the_thirteen_in_closed_form() -> None:
    cost = thirteen_models.examined("torchvision:resnet18", 224)
    assert (cost.parameters, cost.macs) == resnet18() == (11_689_512, 1_814_073_344)
    parameters, macs = alexnet_by_hand((64, 192, 384, 256, 256), (55, 27, 13, 13, 13), 224)
    cost = thirteen_models.examined("torchvision:alexnet", 224)
    assert (cost.parameters, cost.macs) == (sum(parameters), sum(macs)) == (61_100_840, 714_188_480)
    row = thirteen_models._memory(thirteen_models.TOLD[0], cost)
    assert row[4] == pytest.approx(100 * (61.10084 / 61 - 1)) and row[6] == pytest.approx(61_100_840 * 4 / 2**20)
    told = " ".join(thirteen_models._differences([(thirteen_models.TOLD[0], cost)]))
    assert "1 of 1 are within 1 %" in told and "AlexNet (0.714 against 1)" in told and "11.7 per parameter" in told


def test_the_rows_of_alexnet_are_exactly_the_talks(built: dict[str, Any]) -> None:
    original, theirs, totals = tables(built["alexnet"])
    rows = [34_944, 614_656, 885_120, 1_327_488, 884_992, 37_752_832, 16_781_312, 4_097_000]
    assert [r[4] for r in original["rows"]] == [r[5] for r in original["rows"]] == rows
    parameters, macs = alexnet_by_hand((96, 256, 384, 384, 256), (55, 27, 13, 13, 13), 227)
    assert rows == parameters and [r[6] for r in original["rows"]] == macs
    parameters, macs = alexnet_by_hand((64, 192, 384, 256, 256), (55, 27, 13, 13, 13), 224)
    assert [(r[4], r[5]) for r in theirs["rows"]] == [*zip(parameters, macs, strict=True)]
    assert [r[1:3] for r in totals["rows"]] == [[62_378_344] * 2, [61_100_840] * 2]
    assert built["alexnet"]["page"]["differ"][0].startswith("8 of the talk’s 8 rows")
    assert original["rows"][0][2:4] == ["11×11", "96×55×55"]


def test_the_casts_of_pi_are_numpys(built: dict[str, Any]) -> None:
    rows = {r[0]: r for r in tables(built["cast"])[0]["rows"]}
    kept = {
        "float64": np.float64(np.pi),
        "float32": np.float32(np.pi),
        "float16": np.float16(np.pi),
        "int8": np.int8(np.rint(np.pi)),
    }
    for kind, value in kept.items():
        assert float(rows[kind][4]) == float(value)
        assert rows[kind][5] == abs(float(value) - np.pi) and rows[kind][1] == value.itemsize * 8
        assert rows[kind][6] == pytest.approx(100 * abs(float(value) - np.pi) / np.pi, rel=1e-12)
    assert rows["float16"][6] == pytest.approx(3.08e-2, rel=0.01) and rows["int8"][6] == pytest.approx(4.51, rel=0.01)
    weights = {r[0]: r for r in tables(built["cast"])[1]["rows"]}
    assert weights["int8, plain cast"][1] > 99 and weights["int8, plain cast"][2] < weights["float32"][2] - 50
    assert abs(weights["int8, one scale per channel"][2] - weights["float32"][2]) < 2


def test_the_zero_points_are_those_of_the_formula(built: dict[str, Any]) -> None:
    cases = next(t for t in tables(built["scale_and_zero_point"]) if "10,001" in t["caption"])
    low, high, x = -1.0, 3.0, np.linspace(-1, 3, 10_001)
    for (quant_min, quant_max), pair in zip(
        ((0, 255), (-128, 127)), (cases["rows"][:2], cases["rows"][2:]), strict=True
    ):
        scale = (high - low) / (quant_max - quant_min)
        for row, zero in zip(pair, (quant_min - round(low / scale), (high + low) / 2), strict=True):
            codes = np.clip(np.rint(x / scale + zero), quant_min, quant_max)
            errors = np.abs(scale * (codes - zero) - x)
            assert row[2] == zero
            assert row[3] == pytest.approx(errors.max(), rel=1e-4) and row[4] == pytest.approx(
                np.sqrt((errors**2).mean()), rel=1e-4
            )
    assert cases["rows"][1][3] > 100 * cases["rows"][0][3]


def test_all_of_float32_in_256_values_leaves_one_code(built: dict[str, Any]) -> None:
    said = next(p["text"] for p in built["scale_and_zero_point"]["page"]["parts"] if p["kind"] == "text")
    weights = next(t for t in tables(built["scale_and_zero_point"]) if "trained digits" in t["caption"])["rows"]
    top = float(np.finfo(np.float32).max)
    codes = np.rint((np.array([v for row in weights for v in row[1:3]]) + top) / (2 * top / 255))
    assert (
        len(set(codes.tolist())) == 1
        and "get one and the same code" in said
        and "6.8e+38" in said
        and "2.7e+36" in said
    )


def test_the_glossary_is_that_of_the_docs(built: dict[str, Any]) -> None:
    said = " ".join(p["text"] for p in built["glossary"]["page"]["parts"])
    source = (EXAMPLES.parent / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\*\*(.+?)\*\*", source, flags=re.MULTILINE)
    assert len(terms) > 40 and all(f"**{t}**" in said for t in terms)


def test_what_is_left_for_later_claims_nothing(built: dict[str, Any]) -> None:
    (table,) = tables(built["later"])
    assert {"MobileLLM", "QuEST"} <= {r[0] for r in table["rows"]} and all(r[-1] is None for r in table["rows"])


# --------------------------------------------------------------------------------------------- what pages compute with


def test_similarity_of_filters_against_a_loop() -> None:
    weight = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    rows = weight.flatten(1).numpy().astype(np.float64)
    cosine = np.abs([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows])
    largest = np.mean([max(c for j, c in enumerate(row) if j != i) for i, row in enumerate(cosine)])
    signed = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows])
    values = np.linalg.eigvalsh(signed)
    found = redundancy.similarity(weight)
    assert found == pytest.approx((largest, values.sum() ** 2 / (values**2).sum() / 6))
    alike = redundancy.similarity(torch.ones(4, 2, 1, 1))
    assert alike == pytest.approx((1.0, 0.5))
    assert redundancy.similarity(torch.eye(4)[..., None, None]) == pytest.approx((0.0, 1.0))


def test_blur_is_a_gaussian_and_jpeg_is_pillows() -> None:
    from PIL import Image

    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = scipy.ndimage.gaussian_filter(image[0, 0].numpy(), 0.8, mode="constant", radius=2)
    assert noise.blur(image, 0.8)[0, 0].numpy() == pytest.approx(wanted, abs=1e-5)
    file = io.BytesIO()
    Image.fromarray((image[1, 0] * 255).round().byte().numpy()).save(file, "JPEG", quality=20)
    assert noise.jpeg(image, 20)[1, 0].numpy() == pytest.approx(np.asarray(Image.open(file)) / 255, abs=1e-6)
    wide = noise.gaussian(torch.full((1, 1, 200, 200), 0.5), 0.1)
    assert float(wide.std()) == pytest.approx(0.1, rel=0.02) and torch.equal(
        noise.gaussian(image, 0.1), noise.gaussian(image, 0.1)
    )


def at(value: float) -> page.Spread:
    return page.Spread(value=value, low=None, high=None)


def test_break_even_is_where_the_line_comes_to_one_for_good() -> None:
    assert which_zeros.crossing([(50, at(2.0)), (70, at(1.5)), (90, at(0.5))]) == pytest.approx(80)
    assert which_zeros.crossing([(50, at(0.9)), (70, at(1.2)), (90, at(0.8))]) == pytest.approx(80)
    assert which_zeros.crossing([(50, at(2.0)), (90, at(1.1))]) is None
    assert which_zeros.crossing([(50, at(0.5)), (90, at(0.4))]) == 50


@pytest.mark.parametrize("share", which_zeros.SPARSITIES)
def test_every_way_has_as_many_zeros_as_it_says(share: float) -> None:
    program = paredown.capture(
        torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512)), torch.zeros(2, 512)
    )
    for way in which_zeros.FILES:
        module = which_zeros.pruned(program, way, share).module
        if way == "rows removed":  # whole multiples of the target's 8
            assert module[0].weight.shape == module[2].weight.shape[::-1] and module[0].out_features % 8 == 0
            assert abs(module[0].out_features - 512 * (1 - share)) <= 4
        else:
            zeros = [float((layer.weight == 0).double().mean()) for layer in (module[0], module[2])]
            assert zeros == pytest.approx([share] * 2, abs=0.001)


def test_the_next_steps_of_examine_name_pages_of_the_book() -> None:
    programs = [(EXAMPLES / "talk" / f"{name}.py").read_text(encoding="utf-8") for name in book.PAGES]
    assert len(examine.NEXT) == 3
    for _, title in examine.NEXT:
        assert sum(f'title="{title}"' in text for text in programs) == 1


def test_a_mask_of_ones_own_is_a_chessboard_and_rows_that_leave_are_counted() -> None:
    board = pruning_pictures._chessboard(pruning_pictures.WEIGHT, torch.zeros(4, 6, 1, 1))
    assert board is not None and board.shape == (4, 6, 1, 1)
    assert board[..., 0, 0].tolist() == [[(row + column) % 2 == 0 for column in range(6)] for row in range(4)]
    assert pruning_pictures._chessboard("another", torch.zeros(4, 6)) is None

    def plan(*rows: int) -> paredown.Plan:
        kept = np.array([[row not in rows] * 3 for row in range(5)])
        return paredown.Plan(keep={}, masks={pruning_pictures.WEIGHT: paredown.Mask.of(kept, "row")})

    assert "2 of the 3 rows" in pruning_pictures._by_l2(plan(0, 1, 4), plan(1, 3, 4))


@pytest.mark.parametrize(
    ("low", "high", "metric", "recipe"),
    [
        (0.1, 0.9, "holds here", "it improves"),
        (-0.9, -0.1, "does not hold", "it is worse"),
        (-0.2, 0.9, "is not shown", "neither gain nor loss"),
        (None, None, "one seed", "one seed"),
    ],
)
def test_a_gain_is_one_where_its_interval_leaves_out_zero(
    low: float | None, high: float | None, metric: str, recipe: str
) -> None:
    gain = page.Spread(value=0.4, low=low, high=high)
    assert metric in noise._shown(gain)
    assert recipe in pruning_recipe._finding(("50 %", at(99.0), at(20.0), at(99.4), at(-79.0), gain))


def of_seeds(*values: float) -> list[dict[float, float]]:
    """One result for each seed, at one learning rate."""
    return [{0.1: value} for value in values]


def test_a_verdict_on_imposed_masks_needs_an_interval() -> None:
    """Means alone would have said that it holds in the second case."""
    best = dict.fromkeys(from_scratch.WEIGHTS, 0.1)
    others = {"random": of_seeds(90, 91, 92), "rewound": of_seeds(93, 92, 91)}
    for trained, said in (
        ((70, 71, 72), "holds here"),
        ((60, 99, 95), "is not shown"),
        ((97, 97.5, 98), "does not hold"),
    ):
        assert said in from_scratch._verdict({**others, "trained": of_seeds(*trained)}, best)
    one = {w: of_seeds(90) for w in from_scratch.WEIGHTS}
    assert "cannot be said from one seed" in from_scratch._verdict(one, best)


def test_what_redundancy_says_needs_an_interval() -> None:
    told = redundancy.told_of([0.20, 0.22, 0.21], [0.10, 0.11, 0.12])
    assert "more alike than random" in told[0] and "less redundant" in told[1]
    told = redundancy.told_of([0.20, 0.05, -0.10], [0.10, 0.06, 0.12])
    assert "is not shown" in told[0] and "is not shown" in told[1]


def test_the_step_of_a_tile_is_found_and_a_smooth_line_has_none() -> None:
    tiled = {c: at(math.ceil(c / 8)) for c in range(1, 65)}
    smooth = {c: at(float(c)) for c in range(1, 65)}
    mean = 7 / 63
    assert tiles.step_at(tiled, 8) == pytest.approx(1 / mean) and tiles.step_at(smooth, 8) == pytest.approx(1)
    assert tiles.step_at(tiled, 4) == 0  # at 7 of its 15 multiples a tile begins
    rows = [
        ("one", *(tiles.step_at(tiled, w) for w in tiles.WIDTHS)),
        ("two", *(tiles.step_at(smooth, w) for w in tiles.WIDTHS)),
    ]
    assert "8 channels wide" in tiles._told("one", rows) and "no width" in tiles._told("two", rows)


def test_a_layer_of_the_tiles_page_does_what_its_shape_says() -> None:
    assert tiles.layer(24).macs == 24 * 64 * 9 * 14 * 14


def test_cells_say_where_nobody_looked_and_keep_their_interval() -> None:
    assert "not tested" in str(book.cell(None)) and str(book.cell(1234567)) == "1,234,567"
    assert str(book.cell(-0.5, "+.2f")) == "−0.50" and str(book.cell("<b>`x`")) == "&lt;b&gt;<code>x</code>"
    assert str(book.marked("-2 to 3-4 *a* **b** 2 * 3")) == "−2 to 3-4 <em>a</em> <strong>b</strong> 2 * 3"
    told = str(book.cell({"value": 1.5, "low": 1.0, "high": 2.0}, ".1f"))
    assert told == "1.5<small>1.0 to 2.0</small>"
    assert page.spread(Measured(value=None, unit="ms", badge="not tested")) is None
    with pytest.raises(ValueError, match="2 cells"):
        page.Table(caption="", columns=(page.Column(title="a"), page.Column(title="b")), rows=[("one",)])


# ----------------------------------------------------------------------------------------------------------- the book


class Tags(HTMLParser):
    """Every tag is closed in order; references are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data") and v]
        if tag not in ("meta", "img", "br", "path", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle", "polyline"):
            assert self.open.pop() == tag


def test_the_book_stands_alone(built: dict[str, Any]) -> None:
    text = book.bind(built)
    tags = Tags()
    tags.feed(text)
    assert not tags.open and len(set(tags.ids)) == len(tags.ids) > 10
    inside = {r.removeprefix("#") for r in tags.references if r.startswith("#")}
    assert inside <= set(tags.ids) and all(r.startswith(("#", "data:")) for r in tags.references)
    assert not re.search(r"<script|<link|@import|url\(|https?://", text)
    assert "default-src 'none'" in text and len(text) < 3e6
    for name, result in built.items():
        assert result["status"] == "done" and f'href="#{name}"' in text and result["page"]["title"] in text
    assert text.count("data:image/svg+xml;base64,") >= 5 and "def build(setting" in text
    assert "estimated</span>" in text and "not tested</span>" in text and "talk</span>" in text


def test_a_page_that_is_there_is_not_built_again_and_a_torn_one_is(
    built: dict[str, Any], out: Path, quick: page.Setting
) -> None:
    place = out / "pages" / "later.json"
    before = place.stat().st_mtime_ns
    assert book.build(["later"], quick, out)["later"] == built["later"] and place.stat().st_mtime_ns == before
    place.write_text(place.read_text(encoding="utf-8")[:-40], encoding="utf-8")  # as if killed, were it not atomic
    assert book.build(["later"], quick, out)["later"]["status"] == "done" and json.loads(
        place.read_text(encoding="utf-8")
    )
    full = page.Setting(quick=False, folder=out, shared=out)
    assert book._key("later", full) != book._key("later", quick)
    left = [p.name for p in (out / "work").iterdir()]
    assert len(left) == 1 and left[0].startswith("networks-")  # what pages share stays, a page's own folder does not


def test_the_case_study_is_built_again_after_anything_that_it_reads(tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    setting = page.Setting(quick=True, folder=tmp_path, shared=tmp_path, newborn=twin)
    keys = [book._key("case_study", setting)]
    for file in (twin / "journal.jsonl", twin / "recipe.yaml", tmp_path / "twin-longer" / "seed-0" / "result.json"):
        for time in (10**9, 2 * 10**9):  # made, and made anew
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            os.utime(file, (time, time))
            keys.append(book._key("case_study", setting))
            assert book._key("later", setting) == book._key("later", page.Setting(quick=True, folder=twin, shared=twin))
    assert len(set(keys)) == len(keys) == 7


def test_a_page_is_built_again_after_its_glossary_versions_and_paredown_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full page that took long follows versions alone."""
    quick, full = (page.Setting(quick=q, folder=tmp_path, shared=tmp_path) for q in (True, False))
    glossary = tmp_path / "glossary.md"
    keys = [book._key("glossary", quick)]
    monkeypatch.setattr(book, "GLOSSARY", glossary)
    for text in ("# one", "# two"):
        glossary.write_text(text)
        keys.append(book._key("glossary", quick))
    before = book._key("later", full)
    monkeypatch.setattr(book, "_package", lambda: "another")
    keys.append(book._key("glossary", quick))
    assert book._key("later", full) == before
    monkeypatch.setattr(book, "versions", lambda: {"torch": "9"})
    keys.append(book._key("glossary", quick))
    assert book._key("later", full) != before and len(set(keys)) == len(keys) == 5
    first = book.build(["later"], full, tmp_path)["later"]
    monkeypatch.setattr(book, "_package", lambda: "a third")
    again = book.build(["later"], full, tmp_path)["later"]
    assert (first["package"], again["package"]) == ("another", "a third")
    place = tmp_path / "pages" / "later.json"
    place.write_text(json.dumps({**again, "seconds": 3600.0, "package": "old"}))
    assert book.build(["later"], full, tmp_path)["later"]["package"] == "old"


def test_the_digest_of_paredown_is_that_of_its_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    (tmp_path / "within").mkdir()
    monkeypatch.setattr(book.paredown, "__file__", str(tmp_path / "__init__.py"))
    for name, text in (("__init__.py", ""), ("within/a.py", "1"), ("within/a.py", "2"), ("notes.txt", "")):
        (tmp_path / name).write_text(text)
        found.append(book._package.__wrapped__())
    assert len({*found[:3]}) == 3 and found[2] == found[3]


def test_a_folder_that_is_in_use_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / ".lock", writable="", held=""):
        assert book.main([str(tmp_path), "--quick", "--pages", "later"]) == 7
    assert capsys.readouterr().err == (
        f"{tmp_path} must be free. Another run works there. Wait for it, or choose another folder.\n"
    )


def test_a_page_that_fails_is_marked_and_the_others_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "recipe.yaml").write_text("{ torn")
    out = tmp_path / "out"
    command = [str(out), "--quick", "--newborn", str(tmp_path / "twin"), "--pages", "case_study", "later"]
    assert book.main(command) == 1
    text = (out / "book.html").read_text(encoding="utf-8")
    assert "This page failed." in text and "UsageError" in text and "Left for later" in text
    assert "FAILED: case_study" in capsys.readouterr().err
    assert book.main([str(out), "--quick", "--pages", "later"]) == 0
    assert "later: there already" in capsys.readouterr().err


def test_a_book_of_some_pages_keeps_those_of_before(tmp_path: Path) -> None:
    assert book.main([str(tmp_path), "--quick", "--pages", "later"]) == 0
    assert book.main([str(tmp_path), "--quick", "--pages", "glossary"]) == 0
    text = (tmp_path / "book.html").read_text(encoding="utf-8")
    assert text.index('id="glossary"') < text.index('id="later"')  # in the order of the book


def test_an_unknown_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        book.main([str(tmp_path), "--pages", "nonsense"])
    assert refused.value.code == 2


@pytest.mark.slow
def test_a_killed_book_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "talk.book", str(tmp_path), "--quick", "--pages", "alexnet", "cast"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as first:
        assert first.stderr is not None
        while "cast …" not in (line := first.stderr.readline()):
            assert line, "it ended before its second page"
        first.kill()
    assert not (tmp_path / "book.html").exists()
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "alexnet: there already" in again.stderr
    made = (tmp_path / "book.html").read_text(encoding="utf-8")
    assert 'id="alexnet"' in made and 'id="cast"' in made


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in book.PAGES if n not in CHEAP])
def test_every_page_is_built(name: str, quick: page.Setting, out: Path) -> None:
    result = book.build([name], quick, out)[name]
    assert result["status"] == "done", result.get("reason")
    page_ = result["page"]
    assert page_["told"] and page_["parts"] and page_["differ"] and book.bind({name: result})
    marks = {c["mark"] for t in tables(result) for c in t["columns"]}
    assert marks & {"measured", "counted"}
