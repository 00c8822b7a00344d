"""paredown prune, every granularity: what it writes, what the document says of it, and what is refused."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paredown as pare
from paredown.cli.prune import DATA_FREE
from paredown.score import TABLE

IMAGE = ("--input", "1x3x12x12")
NETS = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1))


def attention():
    return nn.TransformerEncoderLayer(16, 4, dim_feedforward=8, batch_first=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        return (x + self.norm(self.conv(x))).relu()


def blocks():
    return nn.Sequential(nn.Conv2d(3, 16, 3), Block(), Block(), nn.Flatten(), nn.Linear(1600, 5))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "models.py"
    path.write_text(NETS, encoding="utf-8")
    return path


def made(models: Path, name: str) -> nn.Module:
    return runpy.run_path(str(models))[name]()


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {n: p for n, p in model.state_dict().items() if p.ndim > 1}


def masked_cells(kept: np.ndarray, granularity: str) -> bool:
    """By hand: whether zeros come in cells of that kind."""
    matrix = kept.reshape(len(kept), -1)
    if ":" in granularity:
        n, m = map(int, granularity.split(":"))
        last = np.moveaxis(kept, 1, -1)
        return all(last[..., i : i + m].sum(-1).max() <= n for i in range(0, kept.shape[1], m))
    if granularity == "kernel":
        return all(np.unique(k).size == 1 for k in kept.reshape(kept.shape[0] * kept.shape[1], -1))
    if granularity == "column":
        return bool((matrix == matrix[:1]).all())
    rows, columns = map(int, granularity.split("x")) if "x" in granularity else (1, 1)
    tiles = [
        matrix[i : i + rows, j : j + columns]
        for i in range(0, matrix.shape[0], rows)
        for j in range(0, matrix.shape[1], columns)
    ]
    return all(np.unique(t).size == 1 for t in tiles)


@pytest.mark.parametrize(
    ("granularity", "amount"),
    [
        ("element", ("--density", "0.25")),
        ("2:4", ()),
        ("5x7", ("--density", "0.5")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("4:8", ()),
                ("1:4", ()),
                ("4x1", ("--density", "0.5")),
                ("kernel", ("--density", "0.5")),
                ("element", ("--macs", "0.5", "--allocation", "global")),
            )
        ),
    ],
)
def test_masks_are_zeros_in_the_file_and_called_simulated(call, models, tmp_path, granularity, amount):
    done = call("prune", f"{models}:net", *IMAGE, "--granularity", granularity, *amount, "--out", "out", "--json")
    assert done.code == 0, done.err
    found, file = done.json, load_file(tmp_path / "out/model.safetensors")
    assert set(file) == set(made(models, "net").state_dict())  # no mask, no second tensor
    assert found["file_bytes"][1] == (tmp_path / "out/model.safetensors").stat().st_size
    assert found["parameters"][0] == found["parameters"][1] and found["macs"][0] == found["macs"][1]
    zeros = {n: (t == 0).numpy() for n, t in file.items() if t.ndim > 1}
    assert {m["parameter"]: m["of"] - m["kept"] for m in found["masks"]} == {
        n: int(z.sum()) for n, z in zeros.items() if z.any()
    }
    assert all(masked_cells(~z, granularity) for z in zeros.values())
    simulated = found["simulated"]
    assert simulated["zeros"] == sum(int(z.sum()) for z in zeros.values())
    places = {"0.weight": 10 * 10, "3.weight": 8 * 8, "5.weight": 8 * 8}
    assert simulated["macs"] == found["macs"][0] == sum(p * zeros[n].size for n, p in places.items())
    assert simulated["effective_macs"] == sum(p * int((~zeros[n]).sum()) for n, p in places.items())
    assert simulated["badges"]["effective_macs"] == "estimated" and simulated["badges"]["gzip_bytes"] == "measured"
    assert simulated["dense_bytes"] == sum(t.numel() * t.element_size() for t in file.values())
    assert found["proof"]["shown"] == ["masks"] and found["granularity"] == granularity
    assert torch.equal(pare.load("out", made(models, "net"))[3].weight, file["3.weight"])


@pytest.mark.parametrize("granularity", ["row", pytest.param("column", marks=pytest.mark.slow)])
def test_rows_and_columns_leave_physically_where_they_can(call, models, tmp_path, granularity):
    done = call(
        "prune", f"{models}:net", *IMAGE, "--granularity", granularity, "--density", "0.5", "--out", "out", "--json"
    )
    assert done.code == 0, done.err
    found, file = done.json, load_file(tmp_path / "out/model.safetensors")
    assert found["file_bytes"][1] < found["file_bytes"][0] and found["macs"][1] < found["macs"][0]
    assert found["proof"]["max_error"] <= 1e-4 * found["proof"]["scale"] and "structure" in found["proof"]["shown"]
    if granularity != "column":  # the output's rows cannot leave: simulated, with the reason
        assert tuple(file["0.weight"].shape) == (8, 3, 3, 3) and file["5.weight"].shape[0] == 8
        assert [m["parameter"] for m in found["masks"]] == ["5.weight"]
        assert any(n.startswith("simulated: ") and "output" in n for n in found["notes"])
    assert any(n.startswith("removed: ") for n in found["notes"])


def test_heads_leave_and_channels_stay(call, models, tmp_path):
    done = call(
        "prune", f"{models}:attention", "--input", "2x5x16", "--granularity", "head", "--channels", "0.5", "--align", "1",
        "--out", "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    file = load_file(tmp_path / "out/model.safetensors")
    shapes = sorted(tuple(t.shape) for t in file.values() if t.ndim == 2)
    assert shapes == [(8, 16), (16, 8), (16, 8), (24, 16)]  # linear1, linear2, out_proj and q, k, v of two heads
    assert done.json["simulated"] is None and done.json["masks"] == []


@pytest.mark.slow
def test_modules_are_listed_left_out_and_pruned_further(call, models, tmp_path):
    ask = ("prune", f"{models}:blocks", *IMAGE)
    listed = call(*ask, "--granularity", "layer", "--dry-run", "--json").json
    assert [c["path"] for c in listed["candidates"]] == ["1", "2"]
    assert listed["candidates"][0]["parameters"] == 16 * 16 * 9 + 16 + 2 * 16
    assert "may be left out" in call(*ask, "--granularity", "layer", "--dry-run").out
    tried = call(*ask, "--drop", "2", "--dry-run", "--json").json
    assert list(tmp_path.iterdir()) == []
    one = call(*ask, "--drop", "2", "--out", "one", "--json").json
    assert one["drop_modules"] == ["2"] and one["parameters"] == tried["parameters"]
    assert one["parameters"][0] - one["parameters"][1] == listed["candidates"][1]["parameters"]
    two = call(*ask, "--pruned", "one", "--channels", "0.5", "--align", "1", "--out", "two", "--json").json
    assert two["parameters"][0] == one["parameters"][1] and two["weights"] == "given"
    done = call(*ask, "--pruned", "two", "--granularity", "2:4", "--out", "three", "--json")
    assert done.code == 0, done.err
    loaded = pare.load("three", made(models, "blocks"))
    assert isinstance(loaded[2], nn.Identity) and tuple(loaded[1].conv.weight.shape) == (8, 8, 3, 3)
    assert done.json["simulated"]["zeros"] == sum(int((t == 0).sum()) for t in weights_of(loaded).values())
    exported = call("export", f"{models}:blocks", *IMAGE, "--pruned", "three", "--out", "m.onnx", "--json").json
    assert exported["check"]["holds"] is True


def test_levels_keep_the_zeros_of_the_levels_before(call, models, tmp_path):
    ask = ("prune", f"{models}:net", *IMAGE)
    assert call(*ask, "--granularity", "element", "--density", "0.3", "--out", "one").code == 0
    done = call(*ask, "--pruned", "one", "--channels", "0.5", "--align", "1", "--out", "two", "--json")
    assert done.code == 0, done.err
    state = load_file(tmp_path / "two/model.safetensors")
    zeros = {n: int((t == 0).sum()) for n, t in state.items() if t.ndim > 1}
    assert {m["parameter"]: m["of"] - m["kept"] for m in done.json["masks"]} == zeros
    assert done.json["simulated"]["zeros"] == sum(zeros.values()) > 0


def test_masks_of_ones_own(call, models, tmp_path):
    kept = np.ones((12, 16, 3, 3), bool)
    kept[:, ::2] = False
    np.savez(tmp_path / "mine.npz", **{"3.weight": kept.astype(np.uint8)})
    save_file({"3.weight": torch.from_numpy(kept)}, tmp_path / "mine.safetensors")
    ask = ("prune", f"{models}:net", *IMAGE, "--json", "--masks")
    for number, name in enumerate(("mine.npz", "mine.safetensors")):
        done = call(*ask, name, "--out", f"out{number}")
        assert done.code == 0, done.err
        file = load_file(tmp_path / f"out{number}/model.safetensors")
        assert np.array_equal(file["3.weight"].numpy() != 0, kept)
        assert [m["granularity"] for m in done.json["masks"]] == ["element"]
    done = call(*ask, "mine.npz", "--granularity", "column", "--out", "smaller")
    assert done.json["parameters"][1] < done.json["parameters"][0]  # nobody reads those channels any more


@pytest.mark.parametrize(
    ("arrays", "code", "says"),
    [
        ({"3.weight": np.full((12, 16, 3, 3), np.nan)}, 2, "0 and 1"),
        ({"3.weight": np.full((12, 16, 3, 3), 0.5)}, 2, "0 and 1"),
        ({"3.weight": np.zeros((12, 16, 3, 3))}, 2, "at least one element"),
        ({"3.weight": np.ones((12, 16, 3, 3))}, 4, "must prune something"),
        ({"3.weight": np.ones((12, 16, 3, 2))}, 2, "shape (12, 16, 3, 3)"),
        ({"3.weigth": np.ones((12, 16, 3, 3))}, 2, "Did you mean 3.weight"),
        ({"1.running_mean": np.ones(16)}, 2, "must name a parameter"),
        ({"3.weight": np.array([{}], dtype=object)}, 3, ".safetensors or .npz"),
        ({"3.weight": np.full((12, 16, 3, 3), "a")}, 2, "0 and 1"),
        ({}, 4, "must prune something"),
    ],
)
def test_masks_that_do_not_fit_are_refused(call, models, tmp_path, arrays, code, says):
    np.savez(tmp_path / "mine.npz", **arrays, allow_pickle=True) if arrays else np.savez(tmp_path / "mine.npz")
    done = call("prune", f"{models}:net", *IMAGE, "--masks", "mine.npz", "--out", "out")
    assert (done.code, says in done.err) == (code, True), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--density", "0.5"), "--granularity element"),
        (("--granularity", "element"), "--density"),
        (("--granularity", "element", "--channels", "0.5"), "--density"),
        (("--granularity", "element", "--density", "1.5"), "float in (0, 1)"),
        (("--granularity", "2:4", "--density", "0.3"), "density=0.5"),
        (("--granularity", "4:2"), "0 < N < M"),
        (("--granularity", "0x4", "--density", "0.5"), "at least one row"),
        (("--granularity", "banana"), "RxC"),
        (("--granularity", "layer"), "--drop"),
        (("--granularity", "element", "--drop", "1"), "layer with --drop"),
        (("--drop", "1", "--density", "0.5"), "without --density"),
        (("--drop", "nope"), "must be one of the model"),
        (("--drop", "3"), "must give what it gets"),
        (("--masks", "m.npz", "--criterion", "l2"), "without --criterion"),
        (("--masks", "m.npz", "--granularity", "head"), "one of masks with --masks"),
        (("--masks", "m.npz", "--drop", "1"), "granularity"),
        (("--granularity", "element", "--density", "0.5", "--criterion", "wanda"), "paredown compress"),
        (("--granularity", "element", "--density", "0.5", "--criterion", "bn_scale"), "no saliency of single weights"),
        (("--granularity", "element", "--density", "0.5", "--align", "8"), "align must be used with channels"),
        (("--granularity", "2:4", "--plot", "m.gif"), ".svg"),
        (("--granularity", "2:4", "--pruned", "nowhere"), "nowhere"),
        (("--granularity", "2:4", "--pruned", ".", "--weights", "w.pt"), "without --weights"),
    ],
)
def test_options_that_contradict_are_refused(call, models, tmp_path, options, says):
    done = call("prune", f"{models}:net", *IMAGE, *options, "--out", "out")
    assert (done.code, says in done.err) == (2, True), done.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_foresees_what_is_reached(call, models, tmp_path):
    ask = ("prune", f"{models}:net", *IMAGE, "--granularity", "element", "--density", "0.3", "--allocation", "erk")
    foreseen = call(*ask, "--dry-run", "--json").json
    assert list(tmp_path.iterdir()) == [] and foreseen["simulated"]["gzip_bytes"] is None
    reached = call(*ask, "--out", "out", "--json").json
    for key in ("zeros", "of", "macs", "effective_macs"):
        assert foreseen["simulated"][key] == reached["simulated"][key]
    assert foreseen["masks"] == reached["masks"] and foreseen["plan_digest"] == reached["plan_digest"]
    assert "estimated" in call(*ask, "--dry-run").out
    refused = call(*ask, "--dry-run", "--plot", "m.png")
    assert (refused.code, "--dry-run" in refused.err) == (2, True)


def test_an_infeasible_density_comes_with_the_nearest_plan(call, models, tmp_path):
    ask = ("--granularity", "element", "--density", "0.01", "--floor", "0.3", "--allocation", "global")
    done = call("prune", f"{models}:net", *IMAGE, *ask, "--out", "out")
    assert done.code == 4
    assert "weights kept (30." in done.err and "effective MACs" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--drop", "1"),
        *(pytest.param(o, marks=pytest.mark.slow) for o in (("--granularity", "2:4"), ("--channels", "0.5"))),
    ],
)
def test_a_picture_of_what_stays(call, models, tmp_path, options):
    pytest.importorskip("matplotlib")
    name = "blocks" if "--drop" in options else "net"
    done = call("prune", f"{models}:{name}", *IMAGE, *options, "--out", "out", "--plot", "cells.svg", "--json")
    assert (done.code, done.json["plot"]) == (0, "cells.svg"), done.err
    text = (tmp_path / "cells.svg").read_text()
    assert text.lstrip().startswith("<?xml") and "<image" in text
    again = call("prune", f"{models}:{name}", *IMAGE, *options, "--out", "out2", "--plot", "cells.svg")
    assert (again.code, "--plot" in again.err) == (2, True)
    assert not (tmp_path / "out2").exists()


def test_folders_that_are_read_are_checked_and_not_written(call, models, tmp_path):
    ask = ("prune", f"{models}:net", *IMAGE, "--granularity", "2:4")
    assert call(*ask, "--out", "one").code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    done = call(*ask, "--pruned", "one", "--out", "one", "--overwrite")
    assert (done.code, "pruned model" in done.err) == (2, True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == before

    form = json.loads((tmp_path / "one/form.json").read_text())
    for damaged in (
        "{",
        json.dumps({**form, "attributes": {"0": {"forward": 1}}}),
        json.dumps({**form, "proof": None}),
    ):
        (tmp_path / "one/form.json").write_text(damaged)
        done = call(*ask, "--pruned", "one", "--out", "two")
        assert (done.code, "form.json" in done.err) == (3, True), done.err
    assert not (tmp_path / "two").exists()


def test_criteria_of_the_command_are_those_that_need_no_data():
    assert set(DATA_FREE) == {name for name, row in TABLE.items() if not row.needs_data}


def test_what_was_pruned_is_factorized(call, models, tmp_path):
    ask = (f"{models}:net", *IMAGE, "--json", "--align", "1")
    pruned = call("prune", *ask, "--channels", "0.5", "--out", "one").json
    done = call("factorize", *ask, "--pruned", "one", "--parameters", "0.7", "--out", "two")
    assert done.code == 0, done.err
    assert done.json["parameters"][0] == pruned["parameters"][1] > done.json["parameters"][1]
    loaded = pare.load("two", made(models, "net"))
    assert sum(p.numel() for p in loaded.parameters()) == done.json["parameters"][1]
