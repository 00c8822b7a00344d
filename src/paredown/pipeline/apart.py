"""Apart: trials of a search in processes of their own, watched from outside, where the recipe limits them (budget.trial).

A server has the libraries loaded and forks for every trial (see sweep.serve). A fork of the run itself would need no state on disk,
but threads of OpenMP and CUDA do not survive one. So the trial reads what the run has come to and captures it anew.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from paredown.errors import InfeasibleError
from paredown.pipeline.fitted import Shrinking
from paredown.pipeline.run import Run
from paredown.pipeline.ways import Here
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune import Pruned, save
from paredown.records import whole_file, write_text
from paredown.search.asking import Answer, FailedApart, OverLimit, Values
from paredown.sweep.slots import Slot, given_back, slot_for
from paredown.sweep.trials import Machine

WORKER = "paredown.pipeline.search_trial"
REQUEST, DENSE, LEVELS = "request.json", "dense.safetensors", "levels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What a trial in a process of its own has seen beside its answer: what was too large, and the nearest plans."""

    smallest: list[tuple[float, str]]
    nearest: list[Plan]


@dataclass(slots=True, kw_only=True)
class Apart:
    """Answers of trials that each have a process."""

    run: Run
    folder: Path
    """What a trial reads."""
    learn: Callable[[Learnt], None]
    slots: list[Slot] = field(default_factory=list)
    """The server, once there was something to ask."""

    def answer(self, values: Values) -> Answer:
        """That of one trial. Raises OverLimit, InfeasibleError, and FailedApart for whatever else ended it."""
        trial, threads = self.run.recipe.budget.trial, int(self.run.environment["threads"])
        if not self.slots:
            self.slots.append(slot_for(Machine(worker=WORKER, processes=1, threads=threads), 0))
        request = {"folder": str(self.folder), "values": dict(values)}
        self.slots[0].ask(None, {"request": request, "seconds": trial.seconds, "memory_bytes": trial.memory})
        answer, end = self._heard(self.slots[0])
        if end.get("server"):
            self.slots.pop().close()
        if end["stopped"]:
            of_time = end["stopped"] == "time"
            allowed = (
                f"{trial.seconds:g} s (budget.trial.seconds)"
                if of_time
                else f"{trial.memory:,} B (budget.trial.memory)"
            )
            reason = f"took more than {allowed}"
            raise OverLimit(reason, end["stopped"])
        if answer is None:
            how = f"signal {-end['ended']}" if end["ended"] < 0 else f"exit code {end['ended']}"
            last = end["tail"][-1] if end["tail"] else "no message"
            why = next(
                (line for line in end["tail"] if line.startswith("Fatal Python error")), last
            )  # before its stack
            reason = f"a process that ended with {how}: {why}"
            raise FailedApart(reason, "")
        plans = [Plan.from_json(plan) for plan in answer["nearest"]]
        self.learn(Learnt(smallest=[(float(n), str(w)) for n, w in answer["smallest"]], nearest=plans))
        if "failed" in answer:
            raise _error(answer["failed"])
        return tuple(answer["losses"]), answer["told"]

    def _heard(self, slot: Slot) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
        """What the trial answered, and how it ended."""
        answer = None
        while True:
            for told in slot.answers():
                if "say" in told:
                    self.run.say(told["say"])
                answer = told.get("answer", answer)
                if "ended" in told:
                    return answer, told


def _error(failed: Mapping[str, Any]) -> InfeasibleError | FailedApart:
    """What a trial raised, as far as it can cross to another process."""
    if not failed["infeasible"]:
        return FailedApart(failed["reason"], failed["where"])
    return InfeasibleError(failed["reason"], None if failed["nearest"] is None else Plan.from_json(failed["nearest"]))


@contextmanager
def apart(
    run: Run,
    *,
    number: int,
    program: Program,
    before: Pruned | None,
    here: Here,
    limits: Mapping[str, float],
    shrinking: Shrinking | None,
    learn: Callable[[Learnt], None],
) -> Iterator[Apart]:
    """Everything that trials of a search read, on disk, and who asks them; all of it ends with the block."""
    folder = run.folder.steps / f"search-{number}" / "apart"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = {n: t.detach().contiguous().clone() for n, t in program.module.state_dict().items()}
    with whole_file(folder / DENSE) as temporary:
        save_file(state, temporary)
    if before is not None:
        save(before, folder / LEVELS)
    recipe, dense = run.recipe, run.dense["artifact"]
    request = {
        "recipe": recipe.to_yaml(),
        "digest": recipe.digest,  # the run's own, where it left out distillation
        "beside": None if recipe.folder is None else str(recipe.folder),
        "weights_given": run.weights_given,
        "environment": dict(run.environment),
        "run": str(run.folder.path.resolve()),
        "number": number,
        "threads": torch.get_num_threads(),
        "dense": {**dataclasses.asdict(dense), "files": [str(f.resolve()) for f in dense.files]},
        "network": here.program.source_digest,
        "limits": dict(limits),
        "shrinking": None if shrinking is None else dataclasses.asdict(shrinking),
    }
    write_text(folder / REQUEST, json.dumps(request))
    asked = Apart(run=run, folder=folder.resolve(), learn=learn)
    try:
        yield asked
    finally:
        for slot in asked.slots:
            if not given_back(slot):
                slot.close()
        shutil.rmtree(folder, ignore_errors=True)
