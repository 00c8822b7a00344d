"""paredown factorize: its document, its files, and what it refuses with which exit code."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pytest
import torch

import paredown as pare

INPUT = ("--input", "1x3x12x12")
KEYS = set("schema parameters macs file_bytes ranks stays_dense realiser proof plan_digest out weights notes".split())


def test_the_document_and_the_files_say_the_same(call, nets, tmp_path):
    done = call("factorize", f"{nets}:net", *INPUT, "--parameters", "0.6", "--align", "1", "--out", "small", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert set(found) == KEYS
    assert found["parameters"][1] <= 0.6 * found["parameters"][0]
    assert found["realiser"] == "module"
    assert found["proof"]["max_error"] <= 1e-4 * found["proof"]["scale"]
    assert found["proof"]["moved"] > 0
    assert (tmp_path / "small/model.safetensors").stat().st_size == found["file_bytes"][1]
    assert json.loads((tmp_path / "small/plan.json").read_text())["digest"] == found["plan_digest"]
    net = runpy.run_path(str(nets))["net"]
    loaded = pare.load(tmp_path / "small", net())
    assert sum(p.numel() for p in loaded.parameters()) == found["parameters"][1]
    for name, rank in found["ranks"].items():
        chain = loaded.get_submodule(name.removesuffix(".weight"))
        assert [m.out_channels for m in chain][:-1] == rank["ranks"]
    counted = pare.examine(pare.capture(loaded, torch.zeros(2, 3, 12, 12)))
    assert counted.macs == found["macs"][1] < found["macs"][0]


@pytest.mark.parametrize("method", ["svd", "spatial_svd", "tucker2"])
def test_every_method_meets_a_budget_of_macs(call, nets, tmp_path, method):
    done = call(
        "factorize", f"{nets}:net", *INPUT, "--macs", "0.5", "--method", method, "--align", "1", "--dry-run", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["macs"][1] <= 0.5 * done.json["macs"][0]
    assert done.json["dry_run"] is True
    assert done.json["file_bytes"][1] is None
    used = {r["method"] for r in done.json["ranks"].values()}
    assert method in used
    assert used <= {method, "svd"}  # a 1×1 convolution has no kernel to split
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["asvd", "svd_llm"])
def test_methods_that_read_inputs_take_a_file_of_them(call, nets, tmp_path, method):
    file = tmp_path / "inputs.npz"
    np.savez(file, x=np.random.default_rng(0).normal(size=(40, 3, 12, 12)).astype(np.float32))
    asked = ("factorize", f"{nets}:net", *INPUT, "--parameters", "0.6", "--align", "1", "--json")
    done = call(*asked, "--method", method, "--calibrate", str(file), "--out", "small")
    assert done.code == 0, done.err
    assert {r["method"] for r in done.json["ranks"].values()} == {method}
    assert done.json["parameters"][1] <= 0.6 * done.json["parameters"][0]
    net = runpy.run_path(str(nets))["net"]
    assert sum(p.numel() for p in pare.load(tmp_path / "small", net()).parameters()) == done.json["parameters"][1]
    idle = call(*asked, "--calibrate", str(file), "--dry-run")
    assert idle.code == 2 and "reads no data" in " ".join(idle.err.split())


def test_energy_and_patterns(call, nets):
    whole = call("factorize", f"{nets}:net", *INPUT, "--energy", "0.5", "--align", "1", "--dry-run", "--json").json
    less = call(
        "factorize", f"{nets}:net", *INPUT, "--energy", "0.5", "--align", "1", "--exclude", "3", "--dry-run", "--json"
    ).json
    assert set(whole["ranks"]) - set(less["ranks"]) == {"3.weight"}
    assert less["stays_dense"]["3.weight"] == "a pattern leaves it out"


def test_a_table_for_people(call, nets, tmp_path):
    done = call("factorize", f"{nets}:net", *INPUT, "--parameters", "0.6", "--align", "1", "--out", "small")
    assert done.code == 0, done.err
    assert "proof: error" in done.out
    assert "3.weight" in done.out
    assert f"wrote {tmp_path.name}" in done.out or "wrote small" in done.out


def test_a_budget_that_is_met_changes_nothing(call, nets, tmp_path):
    done = call("factorize", f"{nets}:net", *INPUT, "--parameters", "999999", "--out", "small", "--json")
    assert done.code == 0, done.err
    assert done.json["already_met"] is True
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--dry-run",), 2, "must be given what remains"),
        (("--macs", "0.5", "--energy", "0.9", "--dry-run"), 2, "Got both"),
        (("--macs", "0.5"), 2, "--out"),
        (("--macs", "1.5", "--dry-run"), 2, "in (0, 1)"),
        (("--macs", "0.5", "--parameters", "0.5", "--dry-run"), 2, "one of them"),
        (("--energy", "1.5", "--dry-run"), 2, "in (0, 1)"),
        (("--macs", "0.5", "--method", "svd_llm", "--dry-run"), 2, "reads data"),
        (("--macs", "0.5", "--method", "svdd", "--dry-run"), 2, "must be one of svd"),
        (("--macs", "0.5", "--exclude", "nothing.*", "--dry-run"), 2, "matches nothing"),
        (("--macs", "0.5", "--exclude", "*", "--dry-run"), 4, "must have something to factorize"),
        (("--parameters", "0.01", "--dry-run"), 4, "must be reducible to"),
        (("--macs", "0.5", "--floor", "1", "--dry-run"), 2, "floor"),
        (("--macs", "0.5", "--align", "0", "--dry-run"), 2, "align"),
    ],
)
def test_what_is_refused(call, nets, tmp_path, options, code, says):
    done = call("factorize", f"{nets}:net", *INPUT, *options)
    assert done.code == code, done.err
    assert says in " ".join(done.err.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_not_overwritten_unasked(call, nets, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small/notes.txt").write_text("mine")
    asked = ("factorize", f"{nets}:net", *INPUT, "--parameters", "0.6", "--align", "1", "--out", "small")
    assert call(*asked).code == 2
    assert call(*asked, "--overwrite").code == 0
    assert (tmp_path / "small/notes.txt").read_text() == "mine"
