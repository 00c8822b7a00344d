"""paredown prune: take channels out of a model by a criterion that needs no data, prove it, save it."""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import emit, only_document, plan_table, say, share, show, table, units_left
from paredown.cli.sources import Loaded, loaded, number
from paredown.errors import InfeasibleError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from paredown.budget import Budget
    from paredown.couple import Coupling
    from paredown.examine import Cost
    from paredown.plan import Plan
    from paredown.prune import Pruned

DATA_FREE = ("l1", "l2", "bn_scale", "random")
_ITEM_NAMES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
_ITEM_NAMES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
_REMAINS = "What remains: a fraction in (0, 1), or a number ≥ 2"


def prune(
    model: options.Model,
    /,
    *,
    input: options.Input,
    macs: Annotated[str | None, Parameter(help=f"{_REMAINS} of multiply-accumulates.")] = None,
    parameters: Annotated[str | None, Parameter(help=f"{_REMAINS} of parameters.")] = None,
    channels: Annotated[str | None, Parameter(help=f"{_REMAINS} of channels, of every space.")] = None,
    criterion: Annotated[str, Parameter(help=f"What makes a channel important: {', '.join(DATA_FREE)}.")] = "l1",
    allocation: Annotated[
        Literal["uniform", "global"], Parameter(help="One ratio, or one ranking of all.")
    ] = "uniform",
    include: Annotated[
        tuple[str, ...], Parameter(help="Only names like this pattern (* and ?).", negative="", show_default=False)
    ] = (),
    exclude: Annotated[
        tuple[str, ...], Parameter(help="Never names like this; wins over --include.", negative="", show_default=False)
    ] = (),
    align: Annotated[int | None, Parameter(help="Kept channels are a multiple of this; default: the target's.")] = None,
    floor: Annotated[float, Parameter(help="Fraction of every space that always remains.")] = 0.1,
    realiser: Annotated[
        Literal["auto", "module", "graph"], Parameter(help="module keeps your class, graph rebuilds the model.")
    ] = "auto",
    target: options.Target = "onnxruntime-x86",
    seed: Annotated[int, Parameter(help="Of the random criterion and of the proof.")] = 0,
    out: Annotated[Path | None, Parameter(help="New folder for model.safetensors, plan.json and form.json.")] = None,
    weights: options.Weights = None,
    strip_prefix: options.StripPrefix = None,
    threads: options.Threads = None,
    device: options.Device = None,
    strict: options.Strict = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Remove channels, physically and with a proof; train the result with your own loop, or use compress."""
    from paredown.budget import Budget

    budget = Budget(macs=number(macs), parameters=number(parameters), channels=number(channels))
    _check_options(budget, criterion, model, weights, out, dry_run=dry_run, overwrite=overwrite)
    with only_document(json):
        import paredown

        found = loaded(
            model, input, weights=weights, strip_prefix=strip_prefix, threads=threads, device=device, seed=seed
        )
        program = found.program
        coupling = paredown.couple(program, strict=strict)
        cost = paredown.examine(program, strict=strict, model=model)
        scores = paredown.score(program, coupling, criterion, seed=seed, weights_given=found.weights == "given")
        try:
            plan = paredown.allocate(
                coupling, scores, cost, budget, target=target, allocation=allocation,
                include=include, exclude=exclude, floor=floor, align=align,
            )  # fmt: skip
        except InfeasibleError as error:
            _say_nearest(error, coupling, cost)
            raise
        asked = _Asked(found=found, coupling=coupling, cost=cost, plan=plan, json=json, quiet=quiet)
        pruned = None
        if plan.keep and not dry_run:
            say("prune and prove", quiet=quiet or json)
            pruned = paredown.prune(program, plan, realiser=realiser, seed=seed)
            assert out is not None  # checked with the options
            paredown.save(pruned, out)
    if not plan.keep:
        return asked.already_met()
    if pruned is None:
        return asked.dry_run()
    assert out is not None  # checked with the options
    return asked.done(pruned, out)


def _check_options(
    budget: Budget,
    criterion: str,
    model: str,
    weights: Path | None,
    out: Path | None,
    *,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """All that can be refused before anything is loaded."""
    if not budget.given():
        msg = "prune must be given what remains: --macs, --parameters or --channels, as --macs 0.5. Got none."
        raise UsageError(msg)
    if criterion not in DATA_FREE:
        later = (
            " It reads data: `paredown compress RECIPE` does that, with prune.criterion."
            if criterion == "taylor"
            else ""
        )
        msg = f"--criterion must be one of {', '.join(DATA_FREE)}. Got {criterion!r}.{later or ' compress knows those that need data.'}"
        raise UsageError(msg)
    if dry_run:
        return
    if out is None:
        msg = "prune must be given --out, a new folder, or --dry-run. Got neither."
        raise UsageError(msg)
    check_out_folder(out, {"model": model.rpartition(":")[0], "weights": str(weights or "")}, overwrite=overwrite)


def check_out_folder(out: Path, inputs: Mapping[str, str], *, overwrite: bool) -> None:
    """A new or empty folder, or with `overwrite` one of earlier results; never the folder of the user's own files."""
    if out.exists() and not out.is_dir():
        msg = f"--out must be a folder. Got the file {str(out)!r}."
        raise UsageError(msg)
    for what, text in inputs.items():
        path = Path(text) if text else None
        if path is not None and path.is_file() and path.resolve().parent == out.resolve():
            msg = f"--out must not be the folder of the {what}. Got {str(out)!r}, which holds {path.name!r}. Choose another --out."
            raise UsageError(msg)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        msg = f"--out must be a new or empty folder. Got {str(out)!r} with files in it. Choose another --out, or --overwrite."
        raise UsageError(msg)


def _say_nearest(error: InfeasibleError, coupling: Coupling, cost: Cost) -> None:
    """The nearest plan, on stderr, before the error itself."""
    if error.nearest is None or not error.nearest.keep:
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print("nearest plan that can be reached:", markup=False)
    console.print(plan_table(coupling, cost, error.nearest), markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What was found out before anything changes, and how it is told."""

    found: Loaded
    coupling: Coupling
    cost: Cost
    plan: Plan
    json: bool
    quiet: bool

    def already_met(self) -> int:
        """Exit 0, and it says so."""
        told = "The budget is already met: nothing was removed, nothing was written."
        if self.json:
            emit(
                {
                    **self._document(self.cost.parameters, self.cost.macs, None),
                    "already_met": True,
                    "notes": [told, *self.found.notes],
                }
            )
        else:
            show(told, *self._notes(), quiet=self.quiet)
        return 0

    def dry_run(self) -> int:
        """The plan as a table; counts are exact, the file was not made."""
        from paredown.allocate import predict

        parameters, macs = predict(self.coupling, self.cost, self.plan)
        if self.json:
            removed = [{"space": s.name, "units": [len(s), units_left(s, self.plan)]} for s in self.coupling.spaces]
            emit(
                {
                    **self._document(parameters, macs, None),
                    "dry_run": True,
                    "removed": removed,
                    "notes": list(self.found.notes),
                }
            )
        else:
            what = plan_table(self.coupling, self.cost, self.plan)
            show(what, *self._notes(), "Dry run: nothing was changed or written.", quiet=self.quiet)
        return 0

    def done(self, pruned: Pruned, out: Path) -> int:
        """What was reached, counted in the pruned model itself, with bytes of the file by stat."""
        import paredown
        from paredown.prune.form import WEIGHTS

        args, kwargs = pruned.program.inputs
        after = paredown.examine(paredown.capture(pruned.module, {"args": args, "kwargs": kwargs}, train=False))
        size = (out / WEIGHTS).stat().st_size
        proof = pruned.proof
        if self.json:
            document = {
                **self._document(after.parameters, after.macs, size),
                "realiser": pruned.realiser,
                "proof": {"max_error": proof.max_error, "scale": proof.scale, "moved": proof.moved, "mode": proof.mode},
                "plan_digest": pruned.plan.digest,
                "out": str(out),
                "notes": [*self.found.notes, *pruned.notes],
            }
            emit(document)
            return 0
        dense = dense_file_bytes(pruned.program.module.state_dict(), pruned.plan.digest)
        figures = (
            ("parameters", self.cost.parameters, after.parameters),
            ("MACs", self.cost.macs, after.macs),
            ("file bytes", dense, size),
        )
        rows = [(name, f"{a:,}", f"{b:,}", share(b, a)) for name, a, b in figures]
        show(
            plan_table(self.coupling, self.cost, self.plan),
            table(("counted", "before", "after", "remains"), rows),
            f"proof: error {proof.max_error:.2g} at output scale {proof.scale:.2g} ({proof.mode}); realiser: {pruned.realiser}",
            *self._notes(),
            *(f"note: {n}" for n in pruned.notes),
            f"wrote {out}",
            quiet=self.quiet,
        )
        return 0

    def _document(self, parameters: int, macs: int, size: int | None) -> dict[str, Any]:
        """The keys that every form of the document has."""
        return {
            "schema": 1,
            "parameters": [self.cost.parameters, parameters],
            "macs": [self.cost.macs, macs],
            "file_bytes": [dense_file_bytes(self.found.program.module.state_dict(), self.plan.digest), size],
            "realiser": None,
            "proof": None,
            "plan_digest": self.plan.digest,
            "out": None,
            "weights": self.found.weights,
        }

    def _notes(self) -> list[str]:
        return [f"note: {n}" for n in self.found.notes]


def dense_file_bytes(state: Mapping[str, Tensor], digest: str) -> int:
    """Bytes of the safetensors file that `save` would write for the dense model: header, padded to 8, and tensors.

    >>> import torch, safetensors.torch
    >>> state = {"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int64)}
    >>> dense_file_bytes(state, "0") == len(safetensors.torch.save(state, metadata={"plan": "0"}))
    True
    """
    header: dict[str, Any] = {"__metadata__": {"plan": digest}}
    at = 0
    for name in sorted(state, key=lambda n: (-state[n].element_size(), n)):
        tensor = state[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        end = at + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _ITEM_NAMES.get(kind, kind.upper()), "shape": shape, "data_offsets": [at, end]}
        at = end
    text = jsonlib.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + at
