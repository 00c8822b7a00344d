"""What scripts rely on: names of commands and options, and the documents of --json."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paredown.cli.app import app
from paredown.cli.front import COMMANDS, page
from paredown.cli.main import main

INPUT = ("--input", "1x3x12x12")
COMMON = "device json pruned quiet strip-prefix threads weights".split()
OPTIONS = {
    "bundle": "cosine golden json max-error out overwrite preprocessing quiet samples".split(),
    "compare": "input json out quiet recorded runs samples seconds threads".split(),
    "compress": "device dry-run json out overwrite quiet set strict threads weights".split(),
    "couple": [*COMMON, "input", "strict"],
    "coverage": "channels family journal json limit memory onnx out quiet retry seconds threads".split(),
    "curve": "device dry-run json out overwrite processes quiet ray retry set".split(),
    "doctor": ["json"],
    "examine": [*COMMON, "by", "file", "input", "overwrite", "plot", "strict", "target-size"],
    "export": [*COMMON, "input", "opset", "out", "overwrite", "scheme", "target"],
    "factorize": [
        *COMMON,
        *"align allocation calibrate dry-run energy exclude floor include input macs method out overwrite".split(),
        "parameters",
        *"realiser seed strict target".split(),
    ],
    "init": ["quiet"],
    "measure": "baseline import input into json quiet runs samples seconds threads".split(),
    "numerics": [*COMMON, "calibrate", "input", "observer", "out", "overwrite"],
    "prune": [
        *COMMON,
        *"align allocation batches calibrate channels criterion data density drop dry-run exclude floor granularity".split(),
        *"include input macs masks out overwrite parameters plot realiser seed strict target task update".split(),
    ],
    "quantize": [
        *COMMON,
        *"bits calibrate data distil epochs float-layers input lr max-steps metric-loss observer opset out overwrite".split(),
        *"repair samples scheme seed size-bytes spare target task teacher".split(),
    ],
    "report": ["json", "mlflow", "quiet", "tensorboard"],
    "sensitivity": "amounts bits device distance json out overwrite quiet set threads weights".split(),
    "setup": ["json", "overwrite", "quiet"],
}


def count_parameters(shapes):
    return sum(int(np.prod(s)) for s in shapes)


NET = count_parameters([(16, 3, 3, 3), (16,), (16,), (16,), (32, 16, 3, 3), (32,), (8, 32, 1, 1), (8,)])
MACS = 10 * 10 * 16 * 27 + 8 * 8 * 32 * 144 + 8 * 8 * 8 * 32


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_the_options_of_every_command_are_these(call, command):
    done = call(command, "--help")
    assert done.code == 0
    listed = set(re.findall(r"(?m)^│[ *]+--([a-z-]+)", done.out)) - {"help", "version"}
    assert listed == set(OPTIONS[command])


def test_the_commands_are_these():
    assert {name for name in app if not name.startswith("-")} == set(OPTIONS)


def test_the_list_of_commands_says_what_each_of_them_says():
    assert {place.rpartition(":")[2] for place in COMMANDS} == set(OPTIONS)
    for place, summary in COMMANDS.items():
        module, _, name = place.partition(":")
        assert inspect.getdoc(getattr(importlib.import_module(module), name)) == summary


@pytest.mark.parametrize("asked", [[], ["--help"], ["-h"]])
def test_the_front_page_lists_every_command_in_full(call, asked):
    done = call(*asked)
    assert done.code == 0
    for columns in (10, 80, 1000):
        lines = page(columns).splitlines()
        assert max(map(len, lines)) <= min(max(columns, 60), 120)
        text = " ".join(" ".join(lines).split())
        for place, summary in COMMANDS.items():
            assert f" {place.rpartition(':')[2]} {summary}" in text
    assert set(re.findall(r"(?m)^  (\w+)  ", done.out)) == set(OPTIONS)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "paredown", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)


def test_examine(call, nets):
    done = call("examine", f"{nets}:net", *INPUT, "--json")
    found = done.json
    assert done.code == 0
    assert found["schema"] == 1
    assert (found["parameters"], found["macs"], found["flops"]) == (NET, MACS, 2 * MACS)
    assert found["parameter_bytes"] == 4 * NET
    assert found["file_bytes"] is None
    assert found["file_badge"] == "not tested"
    assert found["weights"] == "callable"
    assert any("those that the callable made" in note for note in found["notes"])
    for key in ("parameters", "macs", "parameter_bytes", "activation_bytes"):
        assert sum(layer[key] for layer in found["layers"]) == found[key]
    assert {"name", "kind", "output_shape", "parameters", "macs", "parameter_bytes", "activation_bytes"} == set(
        found["layers"][0]
    )
    assert found["uncounted"] == []
    assert found["peak_activation_bytes"] > 0


def test_examine_as_text_says_whose_the_weights_are_and_what_must_shrink(call, nets, tmp_path):
    done = call("examine", f"{nets}:net", *INPUT, "--target-size", "10 kB", "--plot", "bars.svg")
    assert done.code == 0
    assert f"{NET:,}" in done.out
    assert "layer to shrink" in done.out
    assert "those that the callable made" in done.out
    assert (tmp_path / "bars.svg").read_text().lstrip().startswith("<?xml")
    again = call("examine", f"{nets}:net", *INPUT, "--plot", "bars.svg")
    assert (again.code, "--overwrite" in again.err) == (2, True)


def test_examine_compares_the_file_of_the_weights(call, nets, tmp_path):
    save_file(runpy.run_path(str(nets))["net"]().state_dict(), tmp_path / "w.safetensors")
    found = call("examine", f"{nets}:net", *INPUT, "--weights", "w.safetensors", "--json").json
    assert found["weights"] == "given"
    assert found["file_bytes"] == (tmp_path / "w.safetensors").stat().st_size
    assert found["file_badge"] == "measured"


def test_couple(call, nets):
    found = call("couple", f"{nets}:net", *INPUT, "--json").json
    assert set(found) == {"schema", "spaces", "free_units", "pinned_units", "pinned", "unknown_ops", "seconds"}
    assert (found["spaces"], found["free_units"], found["pinned_units"]) == (2, 48, 8)
    assert sum(p["units"] for p in found["pinned"]) == 8
    assert {"reason", "units", "where"} == set(found["pinned"][0])
    text = call("couple", f"{nets}:net", *INPUT).out
    assert "48 units in 2 spaces" in text


def test_prune_writes_what_it_says(call, nets, tmp_path):
    done = call("prune", f"{nets}:net", *INPUT, "--channels", "0.5", "--out", "small", "--json")
    assert done.code == 0
    found = done.json
    half = count_parameters([(8, 3, 3, 3), (8,), (8,), (8,), (16, 8, 3, 3), (16,), (8, 16, 1, 1), (8,)])
    assert found["parameters"] == [NET, half]
    assert found["macs"] == [MACS, 10 * 10 * 8 * 27 + 8 * 8 * 16 * 72 + 8 * 8 * 8 * 16]
    assert found["file_bytes"][1] == (tmp_path / "small/model.safetensors").stat().st_size
    assert found["realiser"] in ("module", "graph")
    assert found["proof"]["max_error"] <= 1e-4 * found["proof"]["scale"]
    assert found["proof"]["moved"] > 0
    assert found["out"] == "small"
    plan = json.loads((tmp_path / "small/plan.json").read_text())
    assert plan["digest"] == found["plan_digest"]
    assert (
        sum(
            t.numel()
            for n, t in load_file(tmp_path / "small/model.safetensors").items()
            if "running" not in n and "num_b" not in n
        )
        == half
    )


def test_the_bytes_before_are_those_of_the_dense_file(call, nets, tmp_path):
    """An oracle of its own: the dense model written by safetensors with the same metadata."""
    found = call("prune", f"{nets}:net", *INPUT, "--channels", "0.5", "--dry-run", "--json").json
    save_file(
        runpy.run_path(str(nets))["net"]().state_dict(),
        tmp_path / "d.safetensors",
        metadata={"plan": found["plan_digest"]},
    )
    assert found["file_bytes"] == [(tmp_path / "d.safetensors").stat().st_size, None]


def test_the_same_command_gives_the_same_bytes(call, nets, tmp_path):
    for name in ("one", "two"):
        assert call("prune", f"{nets}:net", *INPUT, "--macs", "0.5", "--criterion", "random", "--out", name).code == 0
    for file in ("model.safetensors", "plan.json", "form.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_dry_run_shows_the_plan_and_writes_nothing(call, nets, tmp_path):
    done = call(
        "prune",
        f"{nets}:net",
        *INPUT,
        "--channels",
        "0.5",
        "--dry-run",
        "--include",
        "*",
        "--exclude",
        "0",
        "--out",
        "x",
    )
    assert done.code == 0
    assert re.search(r"3\.weight\[0\]\s+channel\s+32\s+16\s+50\.0 %", done.out)
    assert re.search(r"0\.weight\[0\]\s+channel\s+16\s+16\s+100\.0 %", done.out)
    assert "exclude wins over include" in done.out
    assert "nothing was changed or written" in done.out
    assert list(tmp_path.iterdir()) == []


def test_pruned_then_exported_and_measured(call, nets, tmp_path):
    assert call("prune", f"{nets}:net", *INPUT, "--channels", "0.5", "--out", "small").code == 0
    done = call("export", f"{nets}:net", *INPUT, "--pruned", "small", "--out", "small.onnx", "--json")
    found = done.json
    assert done.code == 0
    assert found["file_bytes"] == (tmp_path / "small.onnx").stat().st_size
    assert found["check"]["holds"] is True
    assert found["check"]["max_error"] <= 1e-4 * found["check"]["scale"]
    assert (found["scheme"], found["weights"]) == ("fp32", "given")
    examined = call("examine", "small.onnx", "--json").json
    half = 10 * 10 * 8 * 27 + 8 * 8 * 16 * 72 + 8 * 8 * 8 * 16
    assert examined["macs"] == half
    assert examined["file_bytes"] == found["file_bytes"]
    np.savez(tmp_path / "samples.npz", x=np.zeros((4, 3, 12, 12), np.float32))
    measured = call(
        "measure", "small.onnx", "--samples", "samples.npz", "--runs", "5", "--seconds", "0.2", "--json"
    ).json
    assert measured["measured"]["bytes"]["value"] == found["file_bytes"]
    assert measured["measured"]["latency_ms"]["badge"] == "measured"
    assert measured["not_tested"]
    assert "latency_ms" in call("measure", "small.onnx", *INPUT, "--runs", "5", "--seconds", "0.2").out


def test_quantize_on_given_samples(call, nets, tmp_path):
    np.savez(tmp_path / "calibration.npz", x=np.random.default_rng(0).normal(size=(40, 3, 12, 12)).astype(np.float32))
    asked = ("--calibrate", "calibration.npz", "--opset", "19", "--out", "q.onnx", "--json")
    found = call("quantize", f"{nets}:net", *INPUT, *asked).json
    assert found["scheme"] == "int8"
    assert call("examine", "q.onnx", "--json").json["opset"] == 19
    assert found["check"]["cosine"] >= 0.999
    assert found["calibrated_on"] == "given"
    assert len(found["int8_nodes"]) >= 3


def test_quantize_invents_no_data(call, nets, tmp_path):
    none = call("quantize", f"{nets}:net", *INPUT, "--out", "q.onnx")
    assert (none.code, "--calibrate" in none.err) == (2, True)
    assert list(tmp_path.iterdir()) == []
    done = call("quantize", f"{nets}:net", *INPUT, "--calibrate", "random", "--out", "q.onnx")
    assert done.code == 0
    assert "CALIBRATED ON RANDOM NUMBERS" in done.out


def test_several_inputs_by_name(call, nets, tmp_path):
    inputs = ("--input", "left=2x4 right=2x6")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "c.npz", right=rng.normal(size=(40, 6)), left=rng.normal(size=(40, 4)))  # float64, other order
    assert call("quantize", f"{nets}:Two", *inputs, "--calibrate", "c.npz", "--out", "q.onnx").code == 0
    assert call("measure", "q.onnx", "--samples", "c.npz", "--runs", "5", "--seconds", "0.1").code == 0


def test_stdout_is_one_document_whatever_the_users_code_prints(call, nets):
    done = call("couple", f"{nets}:noisy", *INPUT, "--json")
    assert done.json["schema"] == 1
    assert "not JSON" in done.err


@pytest.mark.slow
def test_doctor(call):
    done = call("doctor", "--json")
    assert done.json["schema"] == 1
    assert done.code == done.json["exit_code"]


def test_init_writes_once(call, tmp_path):
    assert call("init", "mine").code == 0
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["recipe.yaml", "task.py"]
    (tmp_path / "mine/task.py").write_text("# mine\n")
    (tmp_path / "mine/recipe.yaml").unlink()
    again = call("init", "mine")
    assert again.code == 2
    assert (tmp_path / "mine/task.py").read_text() == "# mine\n"
    assert not (tmp_path / "mine/recipe.yaml").exists()


def test_what_init_writes_is_a_task_and_a_recipe(call, tmp_path):
    call("init")
    done = call("compress", "recipe.yaml", "--dry-run", "--json")
    assert done.code == 0
    assert done.json["macs"][1] < 0.51 * done.json["macs"][0]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["recipe.yaml", "task.py"]


@pytest.mark.slow
def test_what_init_writes_runs_from_end_to_end(call, tmp_path):
    call("init")
    done = call("compress", "recipe.yaml", "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert rows[0]["metric"]["value"] > 80
    int8 = next(
        row for row in rows if row["stage"] == "int8"
    )  # which one is recommended hangs on timings of small nets
    assert int8["bytes"] < 0.25 * rows[0]["bytes"]
    assert (tmp_path / "runs/my-model/report.html").is_file()


def test_threads_are_set(call, nets):
    before = torch.get_num_threads()
    try:
        assert call("couple", f"{nets}:net", *INPUT, "--threads", "1").code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_main_reads_the_process_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paredown", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.strip()
