"""Recipes for a phone's runtime, end to end: pruned, quantized, executed in the runtime's own environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from paredown.environments import is_ready
from paredown.pipeline import compress
from paredown.recipe import parse_recipe
from paredown.records import read
from paredown.target import named

TASK = Path(__file__).with_name("small_task.py")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["executorch-xnnpack", "litert"])
def test_a_recipe_ends_in_a_file_of_the_phone(tmp_path: Path, target: str) -> None:
    if not is_ready(named(target)):
        pytest.skip(f"the environment of {target} is not there: paredown setup {target}")
    asked = {
        "schema": 1,
        "task": str(TASK),
        "target": target,
        "threads": 1,
        "prune": {"levels": [{"macs": 0.7}]},
        "recover": {"epochs": 1},
        "dense_twin": {"enabled": False},
        "measure": {"runs": 6, "seconds": 0.2},
    }
    compress(parse_recipe(asked), out=tmp_path / "run", quiet=True)
    records = {r.cell["stage"]: r for r in read(tmp_path / "run" / "records.jsonl")}
    ending = ".pte" if target.startswith("executorch") else ".tflite"
    for stage in ("dense", "level-1", "int8"):
        file = tmp_path / "run" / str(records[stage].details["file"])
        assert file.suffix == ending
        assert file.stat().st_size == records[stage].measured["bytes"].value
        assert records[stage].measured["latency_ms"].value > 0
        assert records[stage].measured["metric"].badge == "measured"
    small, dense = (records[s].measured["bytes"].value for s in ("int8", "dense"))
    assert small < dense
    assert any("phone" in text for text in records["verdict"].details["not_tested"])
