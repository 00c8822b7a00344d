"""Local: whatever ends a trial, or the sweep, ends as a mark or as the same records; nothing is left running."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paredown.errors import Interrupted, ResourceError, UsageError
from paredown.recipe import parse_recipe
from paredown.records import Record
from paredown.sweep import Cell, grid, serve, slots
from paredown.sweep.local import (
    JOURNAL,
    Event,
    Machine,
    _Sweep,
    key_of_trial,
    read_results,
    run_missing,
    trial_folder,
)
from paredown.sweep.slots import Slot, given_back, servers_kept
from paredown.sweep.trials import of_other_versions

VERSIONS = {"paredown": "1", "torch": "2"}
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("STARTED_BY", str(os.getpid()))  # other workers of pytest have servers of their own
    yield
    deadline = time.monotonic() + 5
    while servers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not servers(), "a process of a sweep was left behind"


def servers() -> list[str]:
    """Command lines of running servers of this worker, started from here."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                ours = f"STARTED_BY={os.getpid()}\0" in (process / "environ").read_bytes().decode(errors="replace")
                dead = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if ours and not dead and ("sweep_worker" in line or "time.sleep(600)" in line):
                found.append(line)
    return found


def cells(amounts: tuple[float, ...] = (0.75, 0.5), seeds: tuple[int, ...] = (0, 1), **curve: Any) -> tuple[Cell, ...]:
    asked = {"amounts": [*amounts], "seeds": [*seeds], "controls": {"kinds": ["scratch", "random"]}, **curve}
    return grid(parse_recipe({"schema": 1, "task": "digits", "curve": asked}))


@pytest.fixture(autouse=True, scope="module")
def _no_server_is_kept() -> Iterator[None]:
    """The suite shares servers of trials; here it is looked at what is left of them."""
    with pytest.MonkeyPatch.context() as patch:
        slots._closed(slots._idle)
        patch.setattr(slots, "_keepers", [])
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that ran without any disturbance."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        run_missing(cells(), out, VERSIONS, machine())
    return out


def machine(**more: Any) -> Machine:
    return Machine(**{"worker": "sweep_worker", "processes": 2, **more})


def untimed(folder: Path, some: tuple[Cell, ...]) -> dict[str, dict[str, Any]]:
    found = {}
    for digest, outcome in read_results(some, folder, VERSIONS).items():
        assert outcome.record is not None, outcome
        record = json.loads(outcome.record.to_json())
        for value in record["measured"].values():
            if value["timing"]:
                value.clear()
        found[digest] = record
    return found


def misdeeds(monkeypatch: pytest.MonkeyPatch, **how: str) -> None:
    monkeypatch.setenv("MISDEEDS", json.dumps({k.replace("_", " "): v for k, v in how.items()}))


# ------------------------------------------------------------------------------------------------------ what a sweep does


def test_every_cell_gets_a_record_and_nothing_runs_twice(tmp_path: Path) -> None:
    some, events = cells(), []
    run_missing(some, tmp_path, VERSIONS, machine(), progress=events.append)
    found = read_results(some, tmp_path, VERSIONS)
    assert {o.status for o in found.values()} == {"done"}
    assert len(found) == len(some) == 14
    ends = [e for e in events if e.what == "ends"]
    assert len(ends) == 14
    begun = [e for e in events if e.what == "goes on" and e.told == {"training": "counting", "done": 0, "of": 3}]
    assert len(begun) == 14  # the first of each process too, behind what its libraries print
    for end in ends:
        assert end.outcome is not None and end.outcome.record is not None
        assert end.outcome.record.cell["digest"] == end.cell.digest
    again: list[Event] = []
    run_missing(some, tmp_path, VERSIONS, machine(), progress=again.append)
    assert again == []
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 14


def test_a_new_server_has_the_gpu_of_the_one_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def started(*command: Any, env: dict[str, str], **options: Any) -> Any:
        given.append(env["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(stdout=object())

    monkeypatch.setattr("paredown.sweep.slots.subprocess.Popen", started)
    selector: Any = SimpleNamespace(register=lambda *told: None)
    order: Any = SimpleNamespace(machine=machine(processes=3, gpus=("0", "1", "2")))
    running = _Sweep(order=order)
    for _ in range(3):
        running._new_slot(selector)
    for ended in (0, 1):
        del running.slots[ended]
    for _ in range(2):
        running._new_slot(selector)
    assert given == ["0", "1", "2", "0", "2"]


def test_what_a_cell_needs_is_done_before(tmp_path: Path) -> None:
    some, order = cells(seeds=(0,)), []
    run_missing(
        some, tmp_path, VERSIONS, machine(processes=3), progress=lambda e: order.append((e.what, e.cell.digest))
    )
    begins = {digest: i for i, (what, digest) in enumerate(order) if what == "begins"}
    ends = {digest: i for i, (what, digest) in enumerate(order) if what == "ends"}
    for cell in some:
        for _, digest in cell.needs:
            assert ends[digest] < begins[cell.digest]


def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path, finished: Path) -> None:
    run_missing(cells(), tmp_path, VERSIONS, machine(processes=1))
    assert untimed(tmp_path, cells()) == untimed(finished, cells())


def test_a_trial_has_the_threads_it_is_given(tmp_path: Path) -> None:
    some = cells(amounts=(0.5,), seeds=(0,), controls={"kinds": []})
    run_missing(some, tmp_path, VERSIONS, machine(processes=1, threads=2))
    assert {r["measured"]["threads"]["value"] for r in untimed(tmp_path, some).values()} == {2}


def test_all_servers_are_told_to_end_before_any_is_waited_for() -> None:
    """One that still imports takes its seconds: one after the other, Ctrl-C would take them as often as there are processes."""
    told: list[str] = []

    class Server:
        cell = None

        def leave(self) -> None:
            told.append("leave")

        def close(self, seconds: float = 5) -> None:
            told.append("close")
            assert seconds <= 5

    servers: Any = [Server(), Server(), Server()]
    order: Any = SimpleNamespace(machine=machine(processes=3))
    _Sweep(order=order, slots=servers).stop()
    assert told == ["leave"] * 3 + ["close"] * 3


def test_sweeps_in_a_block_share_servers_that_would_begin_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = cells(amounts=(0.5,), seeds=(0, 1), controls={"kinds": []})

    def by(folder: str, **more: Any) -> set[int]:
        """The servers that ran a sweep."""
        run_missing(some, tmp_path / folder, VERSIONS, machine(**more))
        records = [o.record for o in read_results(some, tmp_path / folder, VERSIONS).values()]
        return {int(r.measured["server"].value or 0) for r in records if r is not None}

    with servers_kept():
        first = by("a")
        assert len(first) == 2 and by("b") == first
        with servers_kept():
            assert by("c", processes=1) < first
        assert by("d") == first, "the outer block keeps them"
        assert not by("e", threads=2) & first, "another number of threads is another server"
        monkeypatch.setenv("ANYTHING", "else")
        assert not by("f") & first
        assert len(servers()) == 2, "those that begin otherwise end"
        ended = slots._idle[0].process
        ended.kill()
        ended.wait()
        assert len(by("g") - {ended.pid}) == 2, "one that ended is none"
    assert not servers() and not slots._idle


def test_a_server_at_work_is_not_kept() -> None:
    with servers_kept():
        slot = Slot(machine(), 0)
        slot.ask(None, {"request": {"folder": "nowhere"}})
        assert not given_back(slot)
        slot.close()
    assert not servers()


def test_other_versions_are_other_results(tmp_path: Path) -> None:
    some = cells(amounts=(0.5,), seeds=(0,), controls={"kinds": []})
    run_missing(some, tmp_path, VERSIONS, machine())
    other = {**VERSIONS, "torch": "3"}
    assert read_results(some, tmp_path, other) == {}
    assert of_other_versions(some, tmp_path, other) == (2, {"torch": ("2", "3")})
    assert of_other_versions(some, tmp_path, VERSIONS) == (0, {})
    run_missing(some, tmp_path, other, machine())
    assert of_other_versions(some, tmp_path, other) == (0, {})
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 4


# ----------------------------------------------------------------------------------------------------- trials that fail


FAILURES = {
    0.9: ("raise", "crashed", "RuntimeError: the loss is no number"),
    0.8: ("refuse", "refused", "nothing is left to remove"),
    0.7: ("segfault", "crashed", "signal 11 (SIGSEGV): File"),
    0.6: ("exit", "crashed", "a line of user code on stdout"),
    0.5: ("hang", "timeout", "not done in 6 s"),
    0.4: ("grow", "out of memory", "more than 0.3 GB in memory"),
    0.3: ("no memory", "out of memory", "can't allocate memory"),
    0.2: ("kill the server", "crashed", "the process that starts trials was ended by signal 9 (SIGKILL), perhaps"),
}


def test_a_failure_is_a_mark_with_its_reason_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = cells(amounts=(*FAILURES, 0.1), controls={"kinds": []})
    misdeeds(monkeypatch, **{f"pruned_{amount}_0": how for amount, (how, _, _) in FAILURES.items()})
    run_missing(some, tmp_path, VERSIONS, machine(seconds=6.0, memory_bytes=300_000_000))
    found = read_results(some, tmp_path, VERSIONS)
    assert len(found) == len(some)
    for cell in some:
        outcome = found[cell.digest]
        if cell.seed == 1 or cell.amount not in FAILURES:
            assert outcome.status == "done", outcome
            continue
        how, status, said = FAILURES[cell.amount]
        assert (outcome.status, outcome.record) == (status, None), (how, outcome)
        assert said in outcome.reason
        if how in ("raise", "refuse", "no memory"):
            assert "Traceback" in "\n".join(outcome.tail)


def test_a_failed_trial_stays_as_it_is_until_it_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some, events = cells(amounts=(0.5,), seeds=(0,), controls={"kinds": ["random"]}), []
    misdeeds(monkeypatch, **{"pruned_0.5_0": "raise"})
    run_missing(some, tmp_path, VERSIONS, machine())
    monkeypatch.delenv("MISDEEDS")
    run_missing(some, tmp_path, VERSIONS, machine(), progress=events.append)
    assert events == []
    run_missing(some, tmp_path, VERSIONS, machine(), retry=True, progress=events.append)
    assert [e.cell.kind for e in events if e.what == "ends"] == ["pruned"]
    assert {o.status for o in read_results(some, tmp_path, VERSIONS).values()} == {"done"}


def test_what_needs_a_failed_trial_is_not_run_and_comes_with_its_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, events = cells(), []
    misdeeds(monkeypatch, base_None_1="raise")
    run_missing(some, tmp_path, VERSIONS, machine(), progress=events.append)
    skipped = [e.cell for e in events if e.outcome is not None and e.outcome.status == "not run"]
    assert len(skipped) == 6
    assert {c.seed for c in skipped} == {1}
    found = read_results(some, tmp_path, VERSIONS)
    assert sum(o.status == "done" for o in found.values()) == 7
    assert len(found) == 8
    monkeypatch.delenv("MISDEEDS")
    run_missing(some, tmp_path, VERSIONS, machine())
    assert len(read_results(some, tmp_path, VERSIONS)) == 8
    run_missing(some, tmp_path, VERSIONS, machine(), retry=True)
    assert {o.status for o in read_results(some, tmp_path, VERSIONS).values()} == {"done"}


def test_a_fault_in_native_code_says_in_which_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = cells(amounts=(0.5,), seeds=(0,), controls={"kinds": []})
    misdeeds(monkeypatch, **{"pruned_0.5_0": "segfault"})
    run_missing(some, tmp_path, VERSIONS, machine(processes=1))
    outcome = read_results(some, tmp_path, VERSIONS)[some[1].digest]
    wanted = (HERE / "sweep_worker.py").read_text().splitlines().index(
        "        os.kill(os.getpid(), signal.SIGSEGV)"
    ) + 1
    assert f'sweep_worker.py", line {wanted} in _misbehave' in outcome.reason
    assert outcome.tail[0].startswith("Fatal Python error: Segmentation fault")


def test_the_reason_is_the_first_line_of_a_message_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        0.5: ("raise lines", "crashed", "RuntimeError: the loss is no number"),
        0.4: ("refuse lines", "refused", "nothing is left to remove:"),
        0.3: ("syntax", "crashed", "SyntaxError: invalid syntax"),
    }
    some = cells(amounts=(*wanted,), seeds=(0,), controls={"kinds": []})
    misdeeds(monkeypatch, **{f"pruned_{amount}_0": how for amount, (how, _, _) in wanted.items()})
    run_missing(some, tmp_path, VERSIONS, machine(processes=1))
    found = read_results(some, tmp_path, VERSIONS)
    told = {c.amount: (found[c.digest].status, found[c.digest].reason) for c in some if c.amount is not None}
    assert told == {amount: (status, reason) for amount, (_, status, reason) in wanted.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="orphans fall to a server on Linux alone")
def test_what_a_trial_leaves_running_in_a_session_of_its_own_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, running = cells(amounts=(0.5,), seeds=(0,), controls={"kinds": ["random"]}), []
    misdeeds(monkeypatch, **{"base_None_0": "daemon", "pruned_0.5_0": "daemon"})

    def progress(event: Event) -> None:
        if event.what == "ends":
            running.append([line for line in servers() if "time.sleep(600)" in line])

    run_missing(some, tmp_path, VERSIONS, machine(processes=1), progress=progress)
    assert running == [[], [], []]
    assert {o.status for o in read_results(some, tmp_path, VERSIONS).values()} == {"done"}


def test_a_trial_that_ends_without_a_word_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = cells(amounts=(0.5,), seeds=(0,), controls={"kinds": []})
    misdeeds(monkeypatch, **{"pruned_0.5_0": "silent"})
    run_missing(some, tmp_path, VERSIONS, machine(processes=1))
    outcome = read_results(some, tmp_path, VERSIONS)[some[1].digest]
    assert (outcome.status, outcome.reason) == ("crashed", "ended with exit code 3, without a result or a message")


def test_what_a_trial_prints_does_not_fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PRINTED_BYTES", 1_000_000)
    printing = "import sys; print('x' * 3_000_000, flush=True); input(); print('the end', flush=True); input()"
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen([sys.executable, "-c", printing], stdin=subprocess.PIPE, stdout=errors) as process,
    ):
        assert process.stdin is not None
        wait_for(lambda: os.fstat(errors.fileno()).st_size == 3_000_001)
        serve.shorten(errors)
        assert os.fstat(errors.fileno()).st_size == 20_000
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(lambda: os.fstat(errors.fileno()).st_size == 20_008)
        serve.shorten(errors)
        assert serve._last_lines(errors)[-1] == "the end"


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_sweep_and_marks_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial after it would fail, within seconds, and stay marked."""
    some = cells(seeds=(0,), controls={"kinds": []})
    misdeeds(monkeypatch, **{"pruned_0.75_0": "disk full"})
    with pytest.raises(ResourceError, match=r"/dev/full must be writable. Got No space left.*same command goes on"):
        run_missing(some, tmp_path, VERSIONS, machine(processes=1))
    assert [o.status for o in read_results(some, tmp_path, VERSIONS).values()] == ["done"]
    monkeypatch.delenv("MISDEEDS")
    run_missing(some, tmp_path, VERSIONS, machine(processes=1))
    assert [o.status for o in read_results(some, tmp_path, VERSIONS).values()] == ["done"] * 3


@pytest.mark.parametrize("bad", [{"processes": 0}, {"processes": -1}])
def test_bad_machines_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--processes must be ≥ 1"):
        machine(**bad)


# -------------------------------------------------------------------------------------------------- sweeps that are ended

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sweep_local import VERSIONS, cells, machine
from paredown.sweep.local import run_missing
Path(sys.argv[1]).mkdir(exist_ok=True)
run_missing(cells(), Path(sys.argv[1]), VERSIONS, machine())
"""


def start(out: Path, step_seconds: float) -> subprocess.Popen[bytes]:
    code = PROGRAM.format(tests=str(HERE))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out)], env={**os.environ, "STEP_SECONDS": str(step_seconds)}
    )


def progress_of(out: Path) -> int:
    """Steps and results on disk."""
    counts = [file.read_text() for file in out.glob("trials/*/count")]
    return sum(int(c) for c in counts if c) + len(list(out.glob("trials/*/result.json")))


def test_killed_at_random_moments_it_continues_to_the_same_records(tmp_path: Path, finished: Path) -> None:
    some, rng, out, killed = cells(), random.Random(5), tmp_path / "killed", 0
    while True:
        process, until = start(out, 0.06), progress_of(out) + rng.randint(3, 12)
        while process.poll() is None and progress_of(out) < until:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        killed += 1
    assert killed >= 4
    assert process.returncode == 0
    assert untimed(out, some) == untimed(finished, some)


def test_a_kill_takes_the_trials_with_it(tmp_path: Path) -> None:
    process = start(tmp_path / "run", 30)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("run/trials/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert servers()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 3
    while servers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not servers()


def test_ctrl_c_ends_at_once_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    some, seen = cells(), []

    def stop(event: Event) -> None:
        seen.append(event)
        if event.what == "ends":
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(Interrupted, match="1 of 14 trials are done or marked; the same command goes on"):
        run_missing(some, tmp_path, VERSIONS, machine(), progress=stop)
    assert time.monotonic() - began < 15
    monkeypatch.setenv("STEP_SECONDS", "0")
    run_missing(some, tmp_path, VERSIONS, machine())
    assert len(read_results(some, tmp_path, VERSIONS)) == 14


def test_ctrl_c_after_the_last_trial_speaks_of_no_others(tmp_path: Path) -> None:
    some, ended = cells(amounts=(0.5,), seeds=(0,), controls={"kinds": []}), []

    def stop(event: Event) -> None:
        ended.extend([event] if event.what == "ends" else [])
        if len(ended) == len(some):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"all 2 trials are done or marked; the same command goes on\.$"):
        run_missing(some, tmp_path, VERSIONS, machine(processes=1), progress=stop)


@pytest.mark.parametrize("tear", ["half a line", "no line end", "garbage between", "journal lost"])
def test_a_torn_journal_loses_nothing(tmp_path: Path, finished: Path, tear: str) -> None:
    some, events = cells(), []
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    wanted, journal = untimed(finished, some), tmp_path / JOURNAL
    text = journal.read_text()
    lines = text.splitlines(keepends=True)
    journal.write_text(
        {
            "half a line": text[: -len(lines[-1]) // 2],
            "no line end": text[:-1],
            "garbage between": "".join([*lines[:2], "\x00\x00 not json\n", *lines[3:]]),
            "journal lost": "",
        }[tear]
    )
    run_missing(some, tmp_path, VERSIONS, machine(), progress=events.append)
    assert events == []
    assert untimed(tmp_path, some) == wanted
    assert all(json.loads(line)["key"] for line in journal.read_text().splitlines() if "not json" not in line)
    assert len(journal.read_text().splitlines()) >= len(some)


@pytest.mark.parametrize("damage", ["empty result", "half a result", "odd line"])
def test_what_is_damaged_is_made_again(tmp_path: Path, finished: Path, damage: str) -> None:
    some, events = cells(), []
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    journal, lost = tmp_path / JOURNAL, some[-1]
    result = trial_folder(tmp_path, lost.digest, VERSIONS) / "result.json"
    lines = [line for line in journal.read_text().splitlines() if lost.digest not in line]
    if damage == "odd line":
        key = key_of_trial(lost.digest, VERSIONS)
        lines += [json.dumps({"key": key}), json.dumps({"key": key, "status": "done", "record": {"cell": {}}})]
        result.unlink()
    else:
        result.write_bytes(b"" if damage == "empty result" else result.read_bytes()[:40])
    journal.write_text("".join(line + "\n" for line in lines))
    run_missing(some, tmp_path, VERSIONS, machine(processes=1), progress=events.append)
    assert [e.cell.digest for e in events if e.what == "ends"] == [lost.digest]
    assert untimed(tmp_path, some) == untimed(finished, some)


def test_what_a_trial_needs_is_made_again_where_its_folder_is_gone(tmp_path: Path, finished: Path) -> None:
    """The journal tells of it, but a trial reads its files: of a base its weights, of a pruned model its shape."""
    some, events = cells(), []
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    lost = next(c for c in some if c.kind == "scratch" and c.seed == 1)
    journal, gone = tmp_path / JOURNAL, {lost.digest, *(d for _, d in lost.needs)}
    lines = [line for line in journal.read_text().splitlines() if json.loads(line)["digest"] != lost.digest]
    journal.write_text("".join(line + "\n" for line in lines))
    for digest in gone:
        shutil.rmtree(trial_folder(tmp_path, digest, VERSIONS))
    assert len(gone) == 3
    run_missing(some, tmp_path, VERSIONS, machine(), progress=events.append)
    assert {e.cell.digest for e in events if e.what == "ends"} == gone
    assert untimed(tmp_path, some) == untimed(finished, some)


def test_ten_thousand_trials_are_read_in_seconds(tmp_path: Path) -> None:
    amounts = tuple(round(0.99 - 0.0009 * i, 5) for i in range(1000))
    many = cells(amounts=amounts, seeds=tuple(range(10)), controls={"kinds": []})
    assert len(many) > 10_000
    record = json.loads(Record(cell={"stage": "trial"}, details={"padding": "x" * 1500}).to_json())
    with (tmp_path / JOURNAL).open("w") as file:
        for cell in many[:-2]:
            row = {
                "key": key_of_trial(cell.digest, VERSIONS),
                "digest": cell.digest,
                "status": "done",
                "record": record,
            }
            file.write(json.dumps(row) + "\n")
        file.write('{"key": "torn')
    start_s, events = time.process_time(), []
    run_missing(many, tmp_path, VERSIONS, machine(), progress=events.append)
    found = read_results(many, tmp_path, VERSIONS)
    assert time.process_time() - start_s < 15
    ended = [e.cell.digest for e in events if e.what == "ends"]  # in any order: two run at a time
    gone = {d for c in many[-2:] for _, d in c.needs}  # their base: the journal has it, and no folder
    assert sorted(ended) == sorted([*gone, *(c.digest for c in many[-2:])]) and len(gone) == 1
    assert {found[d].status for d in ended} == {"done"}
    assert len(found) == len(many)


def test_a_trials_folder_is_named_by_what_it_is() -> None:
    cell = cells()[0]
    assert trial_folder(Path("out"), cell.digest, VERSIONS).name == key_of_trial(cell.digest, VERSIONS)
    assert key_of_trial(cell.digest, VERSIONS) != key_of_trial(cell.digest, {**VERSIONS, "torch": "1"})
