"""Ranks: the recovery of one level by several processes of this machine, started by torchrun: with CUDA, a GPU each.

    python -m paredown.pipeline.ranks FOLDER [PROCESSES]

With PROCESSES it is torchrun, without one of its ranks. FOLDER holds what they read: request.json, the pruned model and
the weights of the teacher; rank 0 writes what came out. The checkpoint of the training lies where one process has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paredown.errors import Interrupted, RejectedError
from paredown.pipeline.compress import task_of
from paredown.pipeline.levels import recovery, without_torch_masks
from paredown.pipeline.run import Run
from paredown.program import capture
from paredown.prune import Pruned, load_pruned, save
from paredown.recipe import parse_recipe
from paredown.recipe_fields import Level
from paredown.records import whole_file, write_text
from paredown.strict_yaml import read_yaml
from paredown.train import Epoch, Progress, recover
from paredown.train.task import stream

REQUEST, TEACHER, RESULT = "request.json", "teacher.safetensors", "result.safetensors"
MARK = "\x1e"
"""Before a line of progress: libraries print as well."""
_SAY_EVERY_S = 0.2
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def recovered_by_ranks(
    run: Run, number: int, level: Level, pruned: Pruned, teacher: nn.Module, progress: Callable[[Progress], None]
) -> Pruned:
    """`recover` of a level, shared by `recover.ranks` processes. Every rank has pruned alike before it wraps: from one plan.

    Raises RejectedError with the last lines of a rank that failed, and Interrupted.
    """
    folder = run.folder.steps / f"level-{number}-ranks"
    shutil.rmtree(folder, ignore_errors=True)
    save(pruned, folder)
    with whole_file(folder / TEACHER) as temporary:
        save_file(_state(teacher), temporary)
    request = {
        "recipe": run.recipe.to_yaml(),
        "beside": None if run.recipe.folder is None else str(run.recipe.folder),
        "number": number,
        "level": level.model_dump(exclude_none=True),
        "checkpoint": str((run.folder.steps / f"level-{number}-training.safetensors").resolve()),
    }
    write_text(folder / REQUEST, json.dumps(request))
    _launched(folder.resolve(), run.recipe.recover.ranks, progress)
    pruned.module.load_state_dict(load_file(folder / RESULT), strict=True)
    shutil.rmtree(folder)
    return pruned


def _launched(folder: Path, ranks: int, progress: Callable[[Progress], None]) -> None:
    command = [sys.executable, "-m", "paredown.pipeline.ranks", str(folder), str(ranks)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as torchrun,
    ):
        assert torchrun.stdout is not None
        try:
            for line in torchrun.stdout:
                if line.startswith(MARK):
                    told = json.loads(line[1:])
                    progress(Progress(**{**told, "history": tuple(Epoch(**e) for e in told["history"])}))
            code = torchrun.wait()
        except KeyboardInterrupt as error:
            msg = "stopped in a training by ranks; the same command continues it from its last epoch."
            raise Interrupted(msg) from error
        finally:
            torchrun.terminate()  # its ranks end with it
        if code:
            errors.seek(0)
            said = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
            why = next((line for line in said if "Error: " in line and "ChildFailedError" not in line), "no message")
            msg = f"a training by ranks must end well. Got exit code {code}: {why[-400:]} Set recover.ranks=1 to see all of it."
            raise RejectedError(msg)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}


# ------------------------------------------------------------------------------------------------- in processes of their own


def torchrun(folder: Path, ranks: int) -> None:
    """Start the ranks on this machine and wait for them."""
    from torch.distributed.run import main

    main(["--standalone", "--nproc-per-node", str(ranks), "-m", "paredown.pipeline.ranks", str(folder)])


def one_rank(folder: Path) -> None:
    """Train as one of the ranks; rank 0 tells how far it is and writes the result."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    recipe = parse_recipe(
        read_yaml(request["recipe"]), folder=None if request["beside"] is None else Path(request["beside"])
    )
    torch.set_num_threads(recipe.threads or 1)
    torch.distributed.init_process_group("nccl" if recipe.device.startswith("cuda") else "gloo")
    task, model, _ = task_of(recipe)
    dense, _ = without_torch_masks(model())  # every rank holds the plan's masks by itself, which are the same
    dense.load_state_dict(load_file(folder / TEACHER), strict=True)
    small = load_pruned(folder, capture(dense.eval(), task.inputs()))
    tuned = recover(
        small, task.train_batches, step=task.step, teacher=dense, seed=stream(recipe.seed, request["number"]),
        device=recipe.device, checkpoint=Path(request["checkpoint"]), progress=_teller(), distributed=True,
        **recovery(recipe.of_level(Level.model_validate(request["level"])).model_dump(), task.optimizer),
    )  # fmt: skip
    if torch.distributed.get_rank() == 0:
        with whole_file(folder / RESULT) as temporary:
            save_file(_state(tuned.module), temporary)
    torch.distributed.destroy_process_group()


def _teller() -> Callable[[Progress], None]:
    said = [0.0]

    def tell(progress: Progress) -> None:
        now = time.monotonic()
        if progress.step == progress.steps or now - said[0] > _SAY_EVERY_S:
            said[0] = now
            print(MARK + json.dumps(dataclasses.asdict(progress)), flush=True)

    return tell


def _end_with_parent() -> None:
    """A kill of the run must leave no rank behind."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    if len(sys.argv) == 3 and "RANK" not in os.environ:
        torchrun(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        one_rank(Path(sys.argv[1]))
