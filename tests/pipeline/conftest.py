"""The small task that recipes of these tests run on, as a module of its own."""

import importlib.util
from pathlib import Path

import pytest

from paredown.train import Task, task_from_module


@pytest.fixture(scope="module")
def task() -> Task:
    spec = importlib.util.spec_from_file_location("small_task_of_tests", Path(__file__).with_name("small_task.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return task_from_module(module, data=None)
