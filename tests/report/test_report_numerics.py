"""The page about numerics: whole, harmless, small, and the numbers on it are those of the facts."""

from __future__ import annotations

import base64
import copy
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report_page import ALLOWED, HOSTILE, Page
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("torchao")

from paredown.errors import MissingError, RejectedError
from paredown.program import capture
from paredown.quantize.facts import numerics_facts
from paredown.report import numerics_figures, page
from paredown.report.numerics import MOST_LAYERS, numerics_page, write_numerics


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return numerics_facts()


@pytest.fixture(scope="module")
def of_model() -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(288, 5)
    )
    program = capture(net.eval(), torch.zeros(2, 3, 8, 8), train=False)
    return numerics_facts(program, [torch.randn(16, 3, 8, 8)], name="net", observer="mse")


@pytest.fixture(scope="module")
def drawn(of_model: dict[str, Any]) -> str:
    """Drawing takes seconds."""
    return numerics_page(of_model)


@pytest.fixture(scope="module")
def drawn_plain(plain: dict[str, Any]) -> str:
    return numerics_page(plain)


def harmless(text: str) -> tuple[Page, list[ET.Element]]:
    """Runs nothing, fetches nothing; every image is an SVG in the page that does not either."""
    shown = Page(text)
    assert {t for t, _ in shown.tags} <= ALLOWED | {"img", "figure", "figcaption", "sub"}
    images = []
    for tag, attributes in shown.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name == "src":
                assert tag == "img" and value is not None
                kind, _, data = value.partition(";base64,")
                assert kind == "data:image/svg+xml"
                images.append(ET.fromstring(base64.b64decode(data)))
                assert len(str(attributes["alt"])) > 20
            if name in ("href", "xlink:href"):
                assert value is not None and value.startswith(("#", "data:text/csv;")), value
    policy = next(a["content"] for t, a in shown.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert any(t == "meta" and a.get("name") == "viewport" for t, a in shown.tags)
    for image in images:
        for element in image.iter():
            assert not str(element.tag).endswith(("script", "image", "foreignObject"))
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#"), (name, value)
    assert len(text.encode()) < 1_000_000
    return shown, images


def test_the_page_without_a_model(drawn_plain: str) -> None:
    shown, images = harmless(drawn_plain)
    assert len(images) == 6
    text = shown.text
    for said in (
        *("3.140625", "2.78e−6 %", "0.0308 %", "4.51 %", "off by 0.000939 %"),  # π, and what the talk says of it
        *("x̂ = s · (q − z)", "6.02 dB", "z = qmin - round(low / s)", "z = (high + low) / 2"),
        *("tensor", "channel", "group", "token", "24.4 %"),
    ):
        assert said in text, said
    assert "Every layer" not in text


def test_numbers_on_the_page_are_those_of_the_facts(of_model: dict[str, Any], drawn: str) -> None:
    shown, images = harmless(drawn)
    assert len(images) == 6 + len(of_model["model"]["worst"]) == 12
    for layer in of_model["model"]["layers"]:
        assert layer["name"] in shown.text
        for number in (
            layer["weight"]["tensor"]["8"],
            layer["weight"]["channel"]["4"],
            layer["activation"]["tensor"]["8"],
        ):
            assert 5 < number < 70
            assert f"{number:.1f}" in shown.text
    for of in ("weights", "activations"):
        for by_bits in of_model["granularity"][of]["sqnr_db"].values():
            assert all(f"{db:.1f}".replace("-", "−") in shown.text for db in by_bits.values())
    link = next(str(a["href"]) for t, a in shown.tags if t == "a" and a.get("download") == "sqnr.csv")
    rows = base64.b64decode(link.partition(",")[2]).decode().splitlines()
    assert len(rows) == 1 + 3 * 3 * 8 + 3 * 8 + 8  # weights, activations per tensor, tokens of the linear layer


def test_a_histogram_has_its_bars_and_the_lines_of_its_grid() -> None:
    about = {
        "bits": 2,
        "levels": [-1.0, 0.0, 1.0, 2.0],
        "histogram": {"low": -1.0, "high": 2.0, "counts": [5, 0, 7], "zeros": 4},
    }
    image = numerics_figures.histogram_with_grid(about)
    assert "12 values from -1 to 2" in image.alt
    root = ET.fromstring(base64.b64decode(image.source.partition(",")[2]))
    ids = [str(e.attrib.get("id", "")) for e in root.iter()]
    assert sum(i.startswith("LineCollection") for i in ids) == 1
    text = " ".join(root.itertext())
    assert "4 exact zeros not drawn" in text  # texts stay texts: they are read and searched


def test_the_staircase_is_that_of_the_mapping() -> None:
    about = {"levels": [-1.0, 0.0, 1.0, 2.0], "scale": 1.0, "zero_point": 1}
    assert "4 levels from -1 to 2" in numerics_figures.staircase(about, -1.0, 2.0, "affine").alt


def test_names_do_nothing(of_model: dict[str, Any]) -> None:
    facts = copy.deepcopy(of_model)
    first, worst = facts["model"]["layers"][0], facts["model"]["worst"][0]
    facts["model"] |= {
        "name": HOSTILE[0] + HOSTILE[1],
        "notes": list(HOSTILE),
        "observer": HOSTILE[2],
        "layers": [{**first, "name": name, "kind": name} for name in HOSTILE],  # drawing is slow, so all in one page
        "worst": [{**worst, "name": name} for name in HOSTILE],
    }
    shown, _ = harmless(numerics_page(facts))
    assert HOSTILE[0] in shown.text  # it is there, as text


def test_what_was_not_measured_is_said(of_model: dict[str, Any]) -> None:
    facts = copy.deepcopy(of_model)
    facts["model"]["observer"] = None
    for layer in facts["model"]["layers"]:
        layer["activation"] = None
        layer["weight"]["channel"]["8"] = None
    shown, _ = harmless(numerics_page(facts))
    assert "not tested" in shown.text
    assert "–" in shown.text


def test_many_layers_stay_below_a_megabyte(of_model: dict[str, Any]) -> None:
    facts = copy.deepcopy(of_model)
    facts["model"]["layers"] = [
        dict(facts["model"]["layers"][0], name=f"blocks.{i}.attn.qkv.weight") for i in range(900)
    ]
    shown, _ = harmless(numerics_page(facts))
    assert f"and {900 - MOST_LAYERS} more layers" in shown.text


def test_same_facts_same_page_and_json_is_enough(of_model: dict[str, Any], drawn: str, tmp_path: Path) -> None:
    read = json.loads(json.dumps(of_model, allow_nan=False))
    assert write_numerics(read, tmp_path / "p.html").read_text(encoding="utf-8") == drawn


def test_the_page_is_drawn_without_torch(plain: dict[str, Any], drawn_plain: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(plain), encoding="utf-8")
    code = (
        "import json, sys\nfrom paredown.report.numerics import write_numerics\n"
        f"write_numerics(json.load(open({str(tmp_path / 'facts.json')!r})), {str(tmp_path / 'p.html')!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == drawn_plain


def test_other_documents_are_refused(plain: dict[str, Any]) -> None:
    for facts in ({}, {**plain, "schema": 2}, {"schema": 1}):
        with pytest.raises(RejectedError, match="schema 1"):
            numerics_page(facts)


def test_missing_matplotlib_is_explained(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingError, match=r"paredown\[report\]"):
        numerics_page(plain)


def test_the_template_turns_no_escaping_off() -> None:
    folder = Path(page.__file__).parent
    template = (folder / "numerics.html").read_text(encoding="utf-8")
    assert "{{" in template
    filtered = [code for code in re.findall(r"\{[{%].*?[%}]\}", template) if "|" in code]
    assert filtered == ["{{ l.name | breakable }}"]  # which escapes:
    assert page._breakable("<b>.x") == "&lt;b&gt;.<wbr>x"
    assert "autoescape" not in template and "<script" not in template
