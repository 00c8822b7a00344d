"""What all tests share: one thread, Hypothesis profiles that do not depend on the speed of the machine, and nets captured once.

The hazard nets (hazards.py) are captured once per process and used by many tests. With `pytest -n 2 --dist loadscope` all
tests of a net go to one process; every other file is one scope, because fixtures of a module would be made in each
process. After each test what it took is compared with what was captured.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of our processes would compile all sources once more
# torch.export keeps the shapes that each op gave. In tiny networks making an entry costs more than the op: a capture
# takes 1.5 times as long, to the same graph. Large networks of equal blocks gain from it: there set it to 1.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
gc.set_threshold(10_000, 20, 20)

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "derandomize": True,
}
settings.register_profile("dev", max_examples=30, **_COMMON)
settings.register_profile("release", max_examples=300, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files first, nets last: many small scopes fill up what is left when the last long file is under way."""
    items.sort(key=lambda item: _net_of(item.nodeid))


def pytest_collection_finish() -> None:
    """What the libraries made lasts as long as the process: looking through it for garbage was a tenth of the time."""
    gc.collect()
    gc.freeze()
    _seed_no_absent_devices()


def _seed_no_absent_devices() -> None:
    """torch.manual_seed keeps a seed for each kind of device until there is one, with the stack it was given at: half a millisecond in a test."""
    torch = sys.modules.get("torch")
    for devices in (torch.cuda, torch.mtia, torch.xpu) if torch is not None else ():
        if not devices.is_available():
            devices.manual_seed_all = lambda seed: None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one net, or of one file, go to one process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByNet(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _net_of(nodeid) or nodeid.partition("::")[0]

    return ByNet(config, log) if config.getoption("dist") == "loadscope" else None


def _net_of(nodeid: str) -> str:
    """The hazard net that a test is about, from its parameters; empty for any other test."""
    file, _, test = nodeid.partition("::")
    values = test.partition("[")[2].removesuffix("]").split("-")
    return next((value for value in values if value in _nets()), "") if _takes_nets(file) else ""


@functools.cache
def _takes_nets(file: str) -> bool:
    path = Path(__file__).parents[1] / file
    return (
        path.is_file() and re.search(r"(?m)^from (hazards|oracle) import", path.read_text(encoding="utf-8")) is not None
    )


@functools.cache
def _nets() -> frozenset[str]:
    """Names of the hazard nets, read from the sources: the process that deals out tests need not load torch."""
    sources = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("hazards*.py"))
    return frozenset(name for text in sources for name in re.findall(r"(?ms)^@hazard\b.*?^def (\w+)\(", text))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    """pytest keeps each test's name in the environment: servers of trials that differ in nothing else could not be shared."""
    os.environ["PYTEST_CURRENT_TEST"] = "a test"


@pytest.fixture(scope="session", autouse=True)
def _servers_of_trials_are_shared() -> Iterator[None]:
    if importlib.util.find_spec("torch") is None:  # what needs no torch is tested without it too
        yield
        return
    from paredown.sweep.slots import servers_kept

    with servers_kept():
        yield


@pytest.fixture(autouse=True)
def _captured_nets_stay_as_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    oracle = sys.modules.get("oracle")
    changed = oracle.changed(_net_of(request.node.nodeid)) if oracle is not None else []
    assert not changed, f"a test must not change what others use too: {', '.join(changed)}"
