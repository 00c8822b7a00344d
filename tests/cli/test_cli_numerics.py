"""paredown numerics: a page, a document, and clear words where options do not fit."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torchao")

INPUT = ("--input", "2x3x12x12")


def test_examples_alone(call, tmp_path):
    done = call("numerics", "--out", "page.html")
    assert done.code == 0
    assert "3.140625" in done.out
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "what quantization costs" in html
    assert len(html) < 1_000_000
    again = call("numerics", "--out", "page.html")
    assert (again.code, "which exists" in again.err) == (2, True)
    assert call("numerics", "--out", "page.html", "--overwrite", "--quiet").out == ""
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html


def test_a_model_with_samples(call, nets, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40, 3, 12, 12)).astype(np.float32))
    done = call(
        "numerics",
        f"{nets}:net",
        *INPUT,
        "--calibrate",
        "x.npy",
        "--observer",
        "percentile",
        "--json",
        "--out",
        "p.html",
    )
    assert done.code == 0
    model = done.json["model"]
    assert [one["name"] for one in model["layers"]] == ["0.weight", "3.weight", "5.weight"]
    assert all(one["activation"]["tensor"]["8"] > one["activation"]["tensor"]["4"] + 15 for one in model["layers"])
    assert (model["observer"], model["weights"]) == ("percentile", "callable")
    assert any("the callable made" in note for note in model["notes"])
    assert (tmp_path / "p.html").exists()
    other = call("numerics", f"{nets}:net", *INPUT, "--calibrate", "x.npy", "--observer", "minmax", "--json").json
    assert other["model"]["layers"][0]["activation"] != model["layers"][0]["activation"]
    assert other["model"]["layers"][0]["weight"] == model["layers"][0]["weight"]


def test_weights_alone_and_random_samples(call, nets):
    plain = call("numerics", f"{nets}:net", *INPUT, "--json").json["model"]
    assert plain["observer"] is None
    assert all(one["activation"] is None for one in plain["layers"])
    noted = call("numerics", f"{nets}:net", *INPUT, "--calibrate", "random", "--json").json["model"]
    assert noted["notes"][0].startswith("CALIBRATED ON RANDOM NUMBERS")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--out page.html"),
        (("--json", "--calibrate", "random"), "must go with a MODEL"),
        (("NET", "--json"), "--input with a model"),
        (("NET", *INPUT, "--json", "--observer", "max"), "observer"),
        (("--out", "."), "must be a file"),
    ],
)
def test_options_that_do_not_fit(call, nets, arguments, said):
    done = call("numerics", *(f"{nets}:net" if a == "NET" else a for a in arguments))
    assert done.code == 2
    assert said in done.err
