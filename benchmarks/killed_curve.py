"""A curve once undisturbed and once killed at random moments and continued: records must be equal in all but timings.

    python benchmarks/killed_curve.py examples/cifar10/curve.yaml --set data=DIR --out runs/killed

    # the page at its own network and layout in some 15 minutes of one core: few images, two steps of training per epoch
    python benchmarks/few_cifar10.py DIR runs/few
    python benchmarks/killed_curve.py examples/cifar10/curve.yaml --set task=benchmarks/few_cifar10.py --set data=runs/few \
        --set recover.max_steps=2 --set recover.batch_norm_batches=2 --set prune.score_batches=2 --set curve.controls.epochs=1 --out runs/killed

Every other kill is of the whole process group (a power cut), the others of the main process alone (its trials must end by
themselves). Each continues at once; where a sweep ends before the last kill the next one begins. One line of JSON at the end; exit code 1 where anything differs, with what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "KILLED_CURVE"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "paredown", "curve", str(asked.recipe), "--processes", str(asked.processes),
        *(part for each in asked.set for part in ("--set", each)), "--out",
    ]  # fmt: skip
    whole = asked.out / "whole"
    began = time.monotonic()
    if not (whole / "curve.json").exists():
        started(command, whole, asked.out / "whole.log").wait()
    seconds = time.monotonic() - began
    if seconds < 60:  # it was there: its trials say how long they took
        seconds = sum(row["seconds"] or 0 for row in rows(whole / "journal.jsonl")) / asked.processes
    longest = max(row["seconds"] or 0 for row in rows(whole / "journal.jsonl"))
    within = max(2 * seconds / (asked.kills + 2), 1.5 * longest)  # most trials that are begun must be able to end
    moments: list[dict[str, Any]] = []
    wrong: list[str] = []
    rng, sweeps = random.Random(asked.seed), 0
    while len(moments) < asked.kills:  # a sweep that is done before the last kill is followed by another one
        sweeps += 1
        killed, left = asked.out / f"killed-{sweeps}", asked.kills - len(moments)
        more = kill_and_continue(command, killed, asked.out / f"killed-{sweeps}.log", left, within, rng)
        moments += [{"sweep": sweeps, **moment} for moment in more]
        wrong += [f"{killed.name}: {what}" for what in differences(whole, killed)]
        if not more:
            break
    told = {
        "recipe": str(asked.recipe), "set": asked.set, "processes": asked.processes, "kills": len(moments), "sweeps": sweeps, "moments": moments,
        "undisturbed_s": round(seconds), "trials": len(records(whole)) - 1, "different": wrong,
    }  # fmt: skip
    print(json.dumps(told))
    return 1 if wrong or len(moments) < asked.kills else 0


def started(command: list[str], out: Path, log: Path) -> subprocess.Popen[bytes]:
    """The command in a process group of its own; what it says is appended to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, str(out)],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, MARK: str(os.getpid())},
        )


def kill_and_continue(
    command: list[str], out: Path, log: Path, kills: int, within: float, rng: random.Random
) -> list[dict[str, Any]]:
    """Kill at `kills` moments, each at most `within` seconds after a start, then let it end: how each was, what was done by then."""
    moments: list[dict[str, Any]] = []
    while True:
        process = started(command, out, log)
        if len(moments) == kills:
            process.wait()
            return moments
        wait = rng.uniform(1, within)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait)
        if process.poll() is not None:
            return moments  # it was done before the last kill
        group = len(moments) % 2 == 0
        ours = of_this_run()
        if group:
            for pid in ours:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        done = len(list(out.glob("trials/*/result.json")))
        moments.append({"whole_group": group, "after_s": round(wait, 2), "processes": len(ours), "results": done})
        print(json.dumps(moments[-1]), file=sys.stderr, flush=True)


def of_this_run() -> list[int]:
    """Every process that carries our mark: trials are in sessions of their own, which no signal to one group reaches."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{MARK}={os.getpid()}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
    return found


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def records(out: Path) -> list[dict[str, Any]]:
    """The records without the values that carry the badge of a timing."""
    found = rows(out / "records.jsonl")
    for record in found:
        for value in record["measured"].values():
            if value["timing"]:
                value.clear()
    return found


def differences(whole: Path, killed: Path) -> list[str]:
    """What differs of records, of the files they tell of, and what a kill left behind."""
    if not (killed / "records.jsonl").exists():
        return ["the killed sweep has no records"]
    wrong = []
    one, other = records(whole), records(killed)
    for a, b in zip(one, other, strict=False):
        wrong += [f"{a['cell'].get('name', a['cell']['stage'])}: {where}" for where in unequal(a, b, "")]
    if len(one) != len(other):
        wrong.append(f"{len(one)} and {len(other)} records")
    names = sorted({p.relative_to(d) for d in (whole, killed) for p in d.rglob("model.*")})
    for name in names:
        if not all((d / name).exists() for d in (whole, killed)):
            wrong.append(f"{name} is in one of them alone")
        elif len({hashlib.sha256((d / name).read_bytes()).digest() for d in (whole, killed)}) > 1:
            wrong.append(f"{name}: other bytes")
    wrong += [f"left behind: {p.relative_to(killed)}" for p in killed.rglob("*.tmp")]
    wrong += [f"still running: {pid}" for pid in of_this_run()]
    return wrong


def unequal(a: Any, b: Any, where: str) -> list[str]:
    """The places at which two documents differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [w for key in sorted({*a, *b}) for w in unequal(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [w for i, pair in enumerate(zip(a, b, strict=True)) for w in unequal(*pair, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {str(a)[:80]} and {str(b)[:80]}"]


if __name__ == "__main__":
    sys.exit(main())
