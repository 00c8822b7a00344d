"""paredown factorize: layers as chains of smaller ones, by the weights alone or by inputs too, proven, saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options, reading
from paredown.cli.prune import check_out_folder
from paredown.cli.pruning import dense_file_bytes
from paredown.cli.show import emit, only_document, say, share, show, table
from paredown.cli.sources import Loaded, continued, loaded, number, refuse_both
from paredown.errors import UsageError

if TYPE_CHECKING:
    from paredown.examine import Cost
    from paredown.plan import Plan
    from paredown.prune import Pruned

DATA_FREE = ("svd", "spatial_svd", "tucker2")
OF_INPUTS = ("asvd", "svd_llm")
"""Methods that read inputs: --calibrate."""
_Method = Annotated[
    str,
    Parameter(help=f"How a weight is split: {', '.join(DATA_FREE)}; with --calibrate {', '.join(OF_INPUTS)}."),
]
_Calibrate = Annotated[
    Path | None,
    Parameter(
        help=f"For {' and '.join(OF_INPUTS)}: .npz or .npy of inputs, samples along the first axis; 16 batches at most."
    ),
]
_REMAINS = "What remains: a fraction in (0, 1), or a number ≥ 2"


def factorize(
    model: options.Model,
    /,
    *,
    input: options.Input,
    macs: Annotated[str | None, Parameter(help=f"{_REMAINS} of multiply-accumulates.")] = None,
    parameters: Annotated[str | None, Parameter(help=f"{_REMAINS} of parameters.")] = None,
    energy: Annotated[float | None, Parameter(help="Instead: the share of Σσ² that every layer keeps.")] = None,
    method: _Method = "svd",
    calibrate: _Calibrate = None,
    allocation: Annotated[
        Literal["global", "uniform"], Parameter(help="Least loss over all layers, or one fraction of each.")
    ] = "global",
    include: Annotated[
        tuple[str, ...], Parameter(help="Only names like this pattern (* and ?).", negative="", show_default=False)
    ] = (),
    exclude: Annotated[
        tuple[str, ...], Parameter(help="Never names like this; wins over --include.", negative="", show_default=False)
    ] = (),
    align: Annotated[int | None, Parameter(help="Ranks are a multiple of this; default: the target's.")] = None,
    floor: Annotated[float, Parameter(help="Fraction of a layer's full rank that always remains.")] = 0.1,
    realiser: Annotated[
        Literal["auto", "module", "graph"], Parameter(help="module keeps your class, graph rebuilds the model.")
    ] = "auto",
    target: options.Target = "onnxruntime-x86",
    seed: Annotated[int, Parameter(help="Of the proof.")] = 0,
    out: Annotated[Path | None, Parameter(help="New folder for model.safetensors, plan.json and form.json.")] = None,
    weights: options.Weights = None,
    strip_prefix: options.StripPrefix = None,
    pruned: options.From = None,
    threads: options.Threads = None,
    device: options.Device = None,
    strict: options.Strict = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Replace layers by low-rank chains, with a proof; train the result with your own loop."""
    from paredown.budget import Budget

    budget = Budget(macs=number(macs), parameters=number(parameters))
    _check_options(budget.given(), energy, method, model, weights, calibrate, out, dry_run=dry_run, overwrite=overwrite)
    refuse_both(pruned, weights)
    with only_document(json):
        import paredown

        source = reading.source(None, None, calibrate, most=16, seed=seed)
        found = loaded(
            model, input, weights=weights, strip_prefix=strip_prefix, threads=threads, device=device, seed=seed
        )
        found, before = (found, None) if pruned is None else continued(found, pruned)
        cost = paredown.examine(found.program, strict=strict, model=model)
        batches = None if source is None else source.of(found.program)
        plan = paredown.choose_ranks(
            found.program, budget if budget.given() else None, energy=energy, method=method, allocation=allocation,
            target=target, align=align, floor=floor, include=include, exclude=exclude, batches=batches,
        )  # fmt: skip
        asked = _Asked(found=found, cost=cost, plan=plan, json=json, quiet=quiet)
        made = None
        if plan.ranks and not dry_run:
            say("factorize and prove", quiet=quiet or json)
            level = paredown.factorize(found.program, plan, batches=batches, realiser=realiser, seed=seed)
            made = level if before is None else paredown.compose(before, level, seed=seed)
            assert out is not None  # checked with the options
            paredown.save(made, out)
    if made is None:
        told = (
            "Dry run: nothing was changed or written."
            if plan.ranks
            else "The budget is already met: nothing was changed or written."
        )
        return asked.unchanged(told)
    assert out is not None  # checked with the options
    return asked.done(made, out)


def _check_options(
    given: dict[str, float | int],
    energy: float | None,
    method: str,
    model: str,
    weights: Path | None,
    calibrate: Path | None,
    out: Path | None,
    *,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """All that can be refused before anything is loaded."""
    if bool(given) == (energy is not None):
        msg = f"factorize must be given what remains (--macs or --parameters, as --macs 0.5) or --energy. Got {'both' if given else 'none'}."
        raise UsageError(msg)
    if method not in (*DATA_FREE, *OF_INPUTS):
        msg = f"--method must be one of {', '.join(DATA_FREE)}, or with --calibrate of {', '.join(OF_INPUTS)}. Got {method!r}."
        raise UsageError(msg)
    if method in OF_INPUTS and calibrate is None:
        msg = f"--method {method} reads data and must be given --calibrate FILE.npz with inputs of the kind that the model will see. Got none. `paredown compress RECIPE` reads the recipe's task."
        raise UsageError(msg)
    if method not in OF_INPUTS and calibrate is not None:
        msg = f"--calibrate must come with --method {' or '.join(OF_INPUTS)}. Got {str(calibrate)!r} with {method}, which reads no data."
        raise UsageError(msg)
    if dry_run:
        return
    if out is None:
        msg = "factorize must be given --out, a new folder, or --dry-run. Got neither."
        raise UsageError(msg)
    check_out_folder(
        out,
        {"model": model.rpartition(":")[0], "weights": str(weights or ""), "calibration": str(calibrate or "")},
        overwrite=overwrite,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What was found out before anything changes, and how it is told."""

    found: Loaded
    cost: Cost
    plan: Plan
    json: bool
    quiet: bool

    def unchanged(self, told: str) -> int:
        """A dry run, or a budget that holds already; exit 0, and it says so."""
        reached = self.plan.made_by["reached"]
        if self.json:
            document = self._document(reached["parameters"], reached["macs"], None)
            document["notes"] = [told, *self.found.notes]
            emit({**document, ("dry_run" if self.plan.ranks else "already_met"): True})
        else:
            drawn = [self._layers()] if self.plan.ranks else []
            show(*drawn, *self._notes(), told, quiet=self.quiet)
        return 0

    def done(self, pruned: Pruned, out: Path) -> int:
        """What was reached, counted in the factorized model itself, with bytes of the file by stat."""
        import paredown
        from paredown.prune.form import WEIGHTS

        args, kwargs = pruned.program.inputs
        after = paredown.examine(paredown.capture(pruned.module, {"args": args, "kwargs": kwargs}, train=False))
        size = (out / WEIGHTS).stat().st_size
        proof = pruned.proof
        if self.json:
            document = self._document(after.parameters, after.macs, size)
            document["realiser"] = pruned.realiser
            document["proof"] = {n: getattr(proof, n) for n in ("max_error", "scale", "moved", "mode")}
            emit({**document, "out": str(out), "notes": list(self.found.notes)})
            return 0
        figures = (
            ("parameters", self.cost.parameters, after.parameters),
            ("MACs", self.cost.macs, after.macs),
            ("file bytes", self._dense_bytes(), size),
        )
        show(
            self._layers(),
            table(
                ("counted", "before", "after", "remains"), [(n, f"{a:,}", f"{b:,}", share(b, a)) for n, a, b in figures]
            ),
            f"proof: error {proof.max_error:.2g} at output scale {proof.scale:.2g} ({proof.mode}); realiser: {pruned.realiser}",
            *self._notes(),
            f"wrote {out}",
            quiet=self.quiet,
        )
        return 0

    def _layers(self) -> Any:
        lost = self.plan.made_by["losses"]
        rows = [
            (name, rank.method, " × ".join(map(str, rank.ranks)), f"{lost[name]:.3g}")
            for name, rank in self.plan.ranks.items()
        ]
        return table(("weight", "method", "ranks", "lost"), rows, left=2)

    def _dense_bytes(self) -> int:
        return dense_file_bytes(self.found.program.module.state_dict(), self.plan.digest)

    def _document(self, parameters: int, macs: int, size: int | None) -> dict[str, Any]:
        """The keys that every form of the document has."""
        made = self.plan.made_by
        return {
            "schema": 1,
            "parameters": [self.cost.parameters, parameters],
            "macs": [self.cost.macs, macs],
            "file_bytes": [self._dense_bytes(), size],
            "ranks": {n: {"method": r.method, "ranks": list(r.ranks)} for n, r in self.plan.ranks.items()},
            "stays_dense": made.get("stays_dense", {}),
            "realiser": None,
            "proof": None,
            "plan_digest": self.plan.digest,
            "out": None,
            "weights": self.found.weights,
        }

    def _notes(self) -> list[str]:
        blocked = self.plan.made_by.get("blocked_by")
        return [*([f"nearest reachable: {blocked}"] if blocked else []), *(f"note: {n}" for n in self.found.notes)]
