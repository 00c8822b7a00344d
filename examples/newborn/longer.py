"""The control that a curve does not have: the dense network of every seed, trained on as long as the pruned ones recover.

    python examples/newborn/longer.py runs/newborn-curve

Without it an error that improves after pruning may have improved by training alone. Reads the dense networks of the sweep, and
writes SWEEP-longer/seed-N with the exported file and result.json, which rows.py takes up. A killed run goes on where it was. Where
the sweep was made anew with other dense networks or another recovery, and where a result does not say of which, it trains again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from newborn import rows, task
from safetensors.torch import load_file

from paredown.errors import Interrupted, ParedownError, RejectedError
from paredown.examine import examine
from paredown.export import check, export, predictor
from paredown.measure import machine_text, sizes, summarize
from paredown.program import capture
from paredown.records import Measured, Record, locked, write_text
from paredown.strict_yaml import read_yaml
from paredown.train import fit
from paredown.train.task import stream


def trained_on(sweep: rows.Sweep, record: Record, recover: dict[str, Any], place: Path) -> Record:
    """The record of one seed: its dense network after as many more epochs as a pruned one gets, exported and measured."""
    seed = int(record.cell["seed"])
    dense = task.model(seed)
    dense.load_state_dict(load_file(sweep.folders[record.cell["digest"]] / "steps" / "base-trained.safetensors"))
    digest = rows.longer_digest(record, recover)
    done = fit(
        dense,
        lambda: task.train_batches(sweep.data),
        task.step,
        seed=stream(seed, 1),  # as a first level's recovery
        checkpoint=place / f"training-{digest[-12:]}.safetensors",
        **{option: recover[option] for option in rows.LONGER_OPTIONS},
    )
    program = capture(done.module.eval(), task.inputs(), train=False)
    artifact = export(program, place / "model.onnx")
    checked = check(artifact, program, lambda: task.calibration_batches(sweep.data))
    predict, where, cost = predictor(artifact), machine_text(), examine(program)
    errors = {
        name: task.evaluate(predict, batches(sweep.data))["mae"]
        for name, batches in (("held_out", task.choose_batches), ("metric", task.test_batches))
    }
    return Record(
        cell={**record.cell, "kind": "longer", "schedule": "trained longer", "digest": digest},
        measured={
            **sizes(artifact.files, where),
            "parameters": Measured(value=cost.parameters, unit=""), "nonzero_parameters": Measured(value=cost.parameters, unit=""),
            "macs": Measured(value=cost.macs, unit="MAC"), "effective_macs": Measured(value=cost.macs, unit="MAC"),
            **{name: summarize(values, "g", where) for name, values in errors.items()},
        },
        environment=record.environment,
        details={
            "file": "model.onnx", "check": {"max_error": checked.max_error, "scale": checked.scale},
            "training": {"trained on": [len(done.history), len(task.train_batches(sweep.data))]},
        },
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing."""
    parser = argparse.ArgumentParser(
        prog="longer.py", description="The dense networks of a newborn sweep, trained as long as its pruned ones."
    )
    parser.add_argument("sweep", type=Path, help=f"folder of `{rows.COMMAND}`, finished or not")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in the sweep: more would give other networks
    try:
        train_missing(given.sweep)
    except (KeyboardInterrupt, Interrupted):
        print("Interrupted. The same command goes on with this seed.", file=sys.stderr)
        return 130
    except ParedownError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def train_missing(folder: Path) -> None:
    """The dense network of every seed of a sweep that has none yet, trained on.

    Raises RejectedError (3: the sweep has no result) and ResourceError (7: another run works there).
    """
    sweep = rows.read_sweep(folder)
    if sweep is None:
        msg = f"{folder} must be the folder of a sweep with at least one result. Got none. Run `{rows.COMMAND}` first."
        raise RejectedError(msg)
    recover, out = read_yaml(folder / "recipe.yaml")["recover"], rows.longer_folder(folder)
    with locked(
        out / ".lock",
        writable=f"{out} must be writable",
        held=f"{out} must be free. Another run works there. Wait for it.",
    ):
        for record in sweep.at(("base", "", None)):
            place = out / f"seed-{record.cell['seed']}"
            result, digest = place / "result.json", rows.longer_digest(record, recover)
            found = Record.from_json(result.read_text(encoding="utf-8")) if result.is_file() else None
            if found is None or found.cell["digest"] != digest:
                place.mkdir(parents=True, exist_ok=True)
                result.unlink(missing_ok=True)  # its file is written over
                found = trained_on(sweep, record, recover, place)
                write_text(result, found.to_json() + "\n")
                for checkpoint in place.glob("training*.safetensors"):
                    checkpoint.unlink()
            print(
                f"seed {record.cell['seed']}: {record.measured['metric'].value:.1f} → {found.measured['metric'].value:.1f} g on test pictures",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
