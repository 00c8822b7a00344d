"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import paredown

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(paredown.__path__, "paredown.") if not m.name.endswith("__main__")
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    said: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert not list(tmp_path.iterdir()), "an example must write to a temporary folder of its own"


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    shown = {
        name for name in MODULES if any(test.examples for test in finder.find(importlib.import_module(name), name))
    }
    assert len(shown) >= 15
    assert {"paredown.budget", "paredown.plan", "paredown.program"} <= shown
