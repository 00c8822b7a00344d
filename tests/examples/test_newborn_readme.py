"""The README of the case study: its commands are real ones, and the way to a bundle is walked as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from paredown.cli import main
from paredown.recipe import load_recipe
from paredown.sweep import grid

ROOT = Path(__file__).parents[2]
README = (ROOT / "examples" / "newborn" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_all_files_and_recipes_that_it_names_are_there(tmp_path: Path) -> None:
    for name in re.findall(r"(?:examples|docs)/[\w./-]+", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^\| (.*?) \|", README, re.MULTILINE):
        assert all((ROOT / "examples" / "newborn" / f).is_file() for f in re.findall(r"`(\w+\.\w+)`", name)), name
    commands = [c for b in BLOCKS for c in re.findall(r"^paredown ([a-z]+)", b, re.MULTILINE)]
    assert {"curve", "compress", "bundle", "measure", "setup"} == set(commands)
    for command in set(commands):
        assert main([command, "--help"]) == 0


def test_the_sweeps_have_as_many_trials_as_it_says() -> None:
    said = int(re.search(r"# (\d+) trials", README)[1])  # type: ignore[index]
    assert len(grid(load_recipe(ROOT / "examples" / "newborn" / "curve.yaml"))) == said
    short = re.search(r"paredown curve (\S+) --out \S+ (--set base.*)", README)
    assert short is not None
    overrides = re.findall(r"--set (?:'([^']+)'|(\S+))", short[2])
    recipe = load_recipe(ROOT / short[1], [a or b for a, b in overrides])
    assert recipe.base.epochs == 2 and {c.seed for c in grid(recipe)} == {0, 1}


@pytest.mark.slow
def test_the_way_to_a_bundle_is_walked_as_it_stands_there(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "own").mkdir()
    told = ["file,weight,split"]
    for i in range(60):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "own" / f"{i}.png")
        told.append(f"{i}.png,{2500 + 20 * i},{('train', 'train', 'train', 'choose', 'test')[i % 5]}")
    (tmp_path / "own" / "labels.csv").write_text("\n".join(told) + "\n")
    (block,) = [b for b in BLOCKS if "paredown bundle" in b]
    short = f"--set base.epochs=2 --set recover.epochs=1 --set budget.metric_loss=null --set measure.seconds=0.5 --set data={tmp_path}/own --out"
    script = block.replace("runs/", f"{tmp_path}/").replace("--out", short, 1)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=ROOT, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with safe_open(tmp_path / "newborn" / "steps" / "twin.safetensors", framework="pt") as kept:
        assert json.loads(kept.metadata()["paredown"])["config"]["epochs"] == 2 + 2 * 1  # base and both recoveries
    results = json.loads((tmp_path / "newborn-bundle" / "results.json").read_text())
    manifest = json.loads((tmp_path / "newborn-bundle" / "manifest.json").read_text())
    assert manifest["model"]["scheme"] == "int8" and len(manifest["golden"]) == len(results["outputs"]) == 8
    assert (tmp_path / "newborn" / "int8.onnx").is_file() and "golden_max_error" in done.stdout
