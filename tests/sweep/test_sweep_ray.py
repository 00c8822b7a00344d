"""Ray: two nodes come to the records of one machine; a node that is killed takes nothing with it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sweep_local import (
    HERE,
    VERSIONS,
    _no_server_is_kept,  # noqa: F401 - here too it is looked at what is left of servers
    cells,
    machine,
    misdeeds,
    servers,
    untimed,
)

from paredown.errors import Interrupted, MissingError, UsageError
from paredown.sweep import Cell, local
from paredown.sweep import ray as on_ray
from paredown.sweep.ray import packed, unpacked
from paredown.sweep.trials import JOURNAL, Event, key_of_trial, read_results

# ------------------------------------------------------------------------------------------------------ without a cluster


def test_files_arrive_as_they_were(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "steps").mkdir(parents=True)
    (here / "a.bin").write_bytes(bytes(range(256)))
    (here / "steps/b.txt").write_text("b")
    (here / ".half.tmp").write_text("half")
    (here / ".lock").touch()
    (here / "link").symlink_to("/etc/hostname")
    unpacked(there, {"old.txt": b"gone next", "a.bin": b"other"})
    unpacked(there, packed(here))
    assert packed(there) == {"a.bin": bytes(range(256)), "steps/b.txt": b"b"}
    assert not (there / "old.txt").exists()
    assert packed(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt"])
def test_files_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="must lie in its folder"):
        unpacked(tmp_path / "place", {"good.txt": b"", name: b""})
    assert not list(tmp_path.rglob("*.txt"))


def test_missing_ray_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match=r"--ray must have Ray.*pip install 'paredown\[ray\]'"):
        on_ray.run_missing(cells(), tmp_path, VERSIONS, machine(cluster="auto"))
    assert not (tmp_path / JOURNAL).exists()


# ------------------------------------------------------------------------------------------------------------ a cluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, so that the driver's own node is never one that works; nodes are added by the tests."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("STARTED_BY", str(os.getpid()))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield made
    finally:
        import ray

        ray.shutdown()
        made.shutdown()
        deadline = time.monotonic() + 10
        while servers() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not servers(), "a process of a sweep was left behind"


def connected(cluster: Any, **environment: str) -> None:
    """The driver of this test, whose workers see these variables."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})


def untraced(folder: Path, some: tuple[Cell, ...]) -> dict[str, tuple[str, str]]:
    return {d: (o.status, o.reason) for d, o in read_results(some, folder, VERSIONS).items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep on one machine."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        local.run_missing(cells(), out, VERSIONS, machine())
    return out


@pytest.mark.slow
def test_two_nodes_come_to_the_records_of_one_machine(tmp_path: Path, finished: Path, cluster: Any) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    events: list[Event] = []
    there = machine(processes=9, cluster=cluster.address)
    on_ray.run_missing(cells(), tmp_path, VERSIONS, there, progress=events.append)  # makes its own connection
    assert untimed(tmp_path, cells()) == untimed(finished, cells())
    done = [row["key"] for row in rows(tmp_path)]
    assert sorted(done) == sorted(key_of_trial(c.digest, VERSIONS) for c in cells())  # each once
    running, most = 0, 0
    for event in events:
        running += {"begins": 1, "ends": -1}[event.what]
        most = max(most, running)
    assert running == 0 and most == 2  # cores of the cluster, not --processes
    begins = {e.cell.digest: i for i, e in enumerate(events) if e.what == "begins"}
    ends = {e.cell.digest: i for i, e in enumerate(events) if e.what == "ends"}
    assert all(ends[digest] < begins[c.digest] for c in cells() for _, digest in c.needs)
    stamp = (tmp_path / JOURNAL).stat().st_mtime_ns
    local.run_missing(cells(), tmp_path, VERSIONS, machine())  # either engine knows what the other did
    assert (tmp_path / JOURNAL).stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_a_killed_node_takes_nothing_with_it(tmp_path: Path, finished: Path, cluster: Any) -> None:
    cluster.add_node(num_cpus=1)
    doomed = cluster.add_node(num_cpus=1)
    connected(cluster, STEP_SECONDS="1", STARTED_BY=str(os.getpid()))
    some, events = cells(amounts=(0.5,)), list[Event]()
    kill = threading.Timer(1.0, lambda: cluster.remove_node(doomed, allow_graceful=False))

    def seen(event: Event) -> None:
        events.append(event)
        if [e.what for e in events].count("begins") == 4 and not kill.ident:
            kill.start()  # both bases are done, and either node is a second into three of its second trial

    on_ray.run_missing(some, tmp_path, VERSIONS, machine(), progress=seen)
    kill.join()
    assert untimed(tmp_path, some) == untimed(finished, some)
    begun = [e.cell.digest for e in events if e.what == "begins"]
    assert len(some) == len(set(begun)) == 8
    assert len(begun) == 9  # the lost one began again
    assert len(rows(tmp_path)) == 8  # and has one line


@pytest.mark.slow
def test_trials_that_fail_are_marked_as_they_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any
) -> None:
    cluster.add_node(num_cpus=2)
    misdeeds(
        monkeypatch, pruned_05_0="raise", pruned_05_1="segfault", pruned_075_0="hang", pruned_075_1="kill the server",
        random_05_0="grow", random_05_1="refuse",
    )  # fmt: skip
    how = os.environ["MISDEEDS"].replace("05 ", "0.5 ").replace("075 ", "0.75 ")
    monkeypatch.setenv("MISDEEDS", how)
    connected(cluster, MISDEEDS=how, STARTED_BY=str(os.getpid()))
    limits = {"seconds": 8.0, "memory_bytes": 400_000_000}
    on_ray.run_missing(cells(), tmp_path / "there", VERSIONS, machine(**limits))
    found = untraced(tmp_path / "there", cells())
    (tmp_path / "here").mkdir()
    local.run_missing(cells(), tmp_path / "here", VERSIONS, machine(**limits))
    assert found == untraced(tmp_path / "here", cells())
    assert {status for status, _ in found.values()} == {"done", "crashed", "timeout", "out of memory", "refused"}
    assert all(row["record"] is None for row in rows(tmp_path / "there") if row["status"] != "done")


@pytest.mark.slow
def test_a_trial_that_ends_its_node_each_time_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any
) -> None:
    cluster.add_node(num_cpus=1)
    connected(cluster, MISDEEDS=json.dumps({"pruned 0.5 0": "kill ray's worker"}), STARTED_BY=str(os.getpid()))
    some = cells(amounts=(0.5,), seeds=(0,), controls={"kinds": []})
    on_ray.run_missing(some, tmp_path, VERSIONS, machine())
    found = [read_results(some, tmp_path, VERSIONS)[c.digest] for c in some]
    assert [o.status for o in found] == ["done", "crashed"]
    assert found[1].reason.startswith("lost 3 times: ")


@pytest.mark.slow
def test_ctrl_c_ends_what_runs_and_what_is_done_stays(tmp_path: Path, finished: Path, cluster: Any) -> None:
    cluster.add_node(num_cpus=2)
    connected(cluster, STEP_SECONDS="0.3", STARTED_BY=str(os.getpid()))

    def stop(event: Event) -> None:
        if event.what == "ends":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="1 of 14 trials are done or marked; the same command goes on"):
        on_ray.run_missing(cells(), tmp_path, VERSIONS, machine(), progress=stop)
    local.run_missing(cells(), tmp_path, VERSIONS, machine())
    assert untimed(tmp_path, cells()) == untimed(finished, cells())


@pytest.mark.slow
def test_no_cluster_and_no_room_are_said_at_once(tmp_path: Path, cluster: Any) -> None:
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(MissingError, match=rf"--ray must be the address.*'{address}'.*ray start --head"):
            on_ray.run_missing(cells(), tmp_path, VERSIONS, machine(cluster=address))
    cluster.add_node(num_cpus=1)
    with pytest.raises(UsageError, match=r"must have the cores of one trial, 2\. Got 1 at most"):
        on_ray.run_missing(cells(), tmp_path, VERSIONS, machine(threads=2, cluster=cluster.address))
    assert not (tmp_path / JOURNAL).exists()
