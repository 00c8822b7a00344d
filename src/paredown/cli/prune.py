"""paredown prune: take channels, heads or modules out of a model, or mask its weights; no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options, reading
from paredown.cli.pruning import Asked, candidates_document, candidates_table, plan_tables
from paredown.cli.quantize import check_out_file
from paredown.cli.show import emit, only_document, say, show
from paredown.cli.sources import Loaded, continued, loaded, number, refuse_both, taken_over
from paredown.errors import InfeasibleError, UsageError

if TYPE_CHECKING:
    from paredown.budget import Budget
    from paredown.couple import Coupling
    from paredown.examine import Cost
    from paredown.granularity import Granularity
    from paredown.plan import Plan
    from paredown.program import Program
    from paredown.prune import Pruned

DATA_FREE = ("l1", "l2", "linf", "lamp", "geometric_median", "bn_scale", "synflow", "random")
OF_INPUTS = ("wanda", "obs", "refit", "apoz", "mean_activation")
"""Criteria that read inputs: --task or --calibrate."""
OF_GRADIENTS = ("taylor", "taylor2", "fisher", "hessian_trace", "snip", "grasp")
"""Criteria that read a loss: --task with its step."""
MODEL_MASKS = Path("model")
"""The word for --masks that names those which MODEL comes with."""
PICTURES = (".svg", ".png", ".pdf")
_REMAINS = "What remains: a fraction in (0, 1), or a number ≥ 2"
_NAMES = {"negative": "", "show_default": False}

_Macs = Annotated[str | None, Parameter(help=f"{_REMAINS} of multiply-accumulates.")]
_Parameters = Annotated[str | None, Parameter(help=f"{_REMAINS} of parameters.")]
_Channels = Annotated[str | None, Parameter(help=f"{_REMAINS} of channels, of every space.")]
_Density = Annotated[str | None, Parameter(help=f"{_REMAINS} of the weights that masks are of.")]
_Cells = Annotated[
    str | None,
    Parameter(
        help="channel, head and layer leave physically; element, 2:4, 4x1, row, column, kernel are masks. Default: channel."
    ),
]
_Drop = Annotated[tuple[str, ...], Parameter(help="A module to leave out, as layer3.1; again for more.", **_NAMES)]
_Masks = Annotated[
    Path | None,
    Parameter(
        help="Your own masks: .safetensors or .npz, one array per parameter; 1 is kept. Or the word model: those of "
        "torch.nn.utils.prune that MODEL comes with."
    ),
]
_Criterion = Annotated[
    str | None,
    Parameter(
        help=f"What makes a channel or weight important: {', '.join(DATA_FREE)}; with --task or --calibrate "
        f"{', '.join(OF_INPUTS)}; with --task {', '.join(OF_GRADIENTS)}. Default: l1."
    ),
]
_Update = Annotated[
    Literal["none", "obs"],
    Parameter(
        help="obs: the weights that stay answer for those that masks take (SparseGPT); reads --task or --calibrate."
    ),
]
_Allocation = Annotated[
    Literal["uniform", "global", "erk"] | None,
    Parameter(help="One ratio, one ranking of all, or (masks) by layer shape. Default: uniform."),
]
_Include = Annotated[tuple[str, ...], Parameter(help="Only names like this pattern (* and ?).", **_NAMES)]
_Exclude = Annotated[tuple[str, ...], Parameter(help="Never names like this; wins over --include.", **_NAMES)]
_Align = Annotated[int | None, Parameter(help="Kept channels are a multiple of this; default: the target's.")]
_Floor = Annotated[
    float | None, Parameter(help="Fraction of every space or weight that always remains; default: 0.1 of channels.")
]
_Realiser = Annotated[
    Literal["auto", "module", "graph"], Parameter(help="module keeps your class, graph rebuilds the model.")
]
_Plot = Annotated[Path | None, Parameter(help=f"Draw kept and pruned cells into this file ({', '.join(PICTURES)}).")]
_Out = Annotated[Path | None, Parameter(help="New folder for model.safetensors, plan.json and form.json.")]
_Seed = Annotated[int, Parameter(help="Of the random criterion and of the proof.")]


def prune(
    model: options.Model,
    /,
    *,
    input: options.Input,
    macs: _Macs = None,
    parameters: _Parameters = None,
    channels: _Channels = None,
    density: _Density = None,
    granularity: _Cells = None,
    drop: _Drop = (),
    masks: _Masks = None,
    criterion: _Criterion = None,
    update: _Update = "none",
    task: reading.Task = None,
    data: reading.Data = None,
    calibrate: reading.Calibrate = None,
    batches: reading.Batches = 16,
    allocation: _Allocation = None,
    include: _Include = (),
    exclude: _Exclude = (),
    align: _Align = None,
    floor: _Floor = None,
    realiser: _Realiser = "auto",
    target: options.Target = "onnxruntime-x86",
    seed: _Seed = 0,
    out: _Out = None,
    plot: _Plot = None,
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
    """Remove channels, heads or modules, or mask weights, with a proof; train the result with your own loop, or use compress."""
    # Masks of torch.nn.utils.prune that MODEL comes with are a level of their own: what is asked for comes on top of them.
    from paredown.budget import Budget

    budget = Budget(
        macs=number(macs), parameters=number(parameters), channels=number(channels), density=number(density)
    )
    how: dict[str, Any] = {"criterion": criterion, "allocation": allocation, "align": align, "floor": floor}
    how |= {"include": include or None, "exclude": exclude or None}
    choice = _Choice(
        granularity=_granularity(granularity, drop, masks), budget=budget, drop=drop, masks=masks,
        how={n: v for n, v in how.items() if v is not None}, target=target, seed=seed, update=update,
        reads="--task" if task is not None else "--calibrate" if calibrate is not None else "",
    )  # fmt: skip
    choice.check(dry_run=dry_run)
    refuse_both(pruned, weights)
    if pruned is not None and masks == MODEL_MASKS:
        msg = f"--masks model must stand without --pruned, whose folder says what was masked. Got {str(pruned)!r}."
        raise UsageError(msg)
    read = {
        "weights": weights,
        "masks": masks,
        "calibration": calibrate,
        "pruned model": None if pruned is None else pruned / "form.json",
    }
    _check_places(out, plot, model, read, dry_run=dry_run, overwrite=overwrite)
    with only_document(json):
        source = reading.source(task, data, calibrate, most=batches, seed=seed)
        found = loaded(
            model, input, weights=weights, strip_prefix=strip_prefix, threads=threads, device=device, seed=seed,
            take_masks=pruned is None,
        )  # fmt: skip
        found, before = _earlier(found, pruned, masks)
        tell = _carried_out(
            choice, found, before, source, realiser, None if dry_run else out, plot, name=model, strict=strict, json=json,
            quiet=quiet,
        )  # fmt: skip
    return tell()


def _earlier(found: Loaded, pruned: Path | None, masks: Path | None) -> tuple[Loaded, Pruned | None]:
    """What was pruned before, which this level starts from: in a folder, or by masks that MODEL came with."""
    if pruned is not None:
        return continued(found, pruned)
    if found.masks is not None and masks != MODEL_MASKS:
        return taken_over(found)
    return found, None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What is asked for."""

    granularity: Granularity
    budget: Budget
    drop: tuple[str, ...]
    masks: Path | None
    how: Mapping[str, Any]
    """Options of scoring and allocating that were given."""
    target: str
    seed: int
    update: str
    reads: str
    """--task or --calibrate, whichever was given; else ""."""

    @property
    def criterion(self) -> str:
        """Of scoring, by name."""
        return str(self.how.get("criterion", "l1"))

    def check(self, *, dry_run: bool) -> None:
        """All that can be refused before anything is loaded."""
        kind = self.granularity
        own = "--drop" if self.drop else "--masks" if self.masks else ""
        given = [*self.budget.given(), *self.how]
        if own and given:
            msg = f"{own} must stand without --{given[0].replace('_', '-')}: it says itself what is pruned. Got both."
            raise UsageError(msg)
        if self.drop and self.masks:
            msg = "--drop and --masks must be given one after the other, the second with --pruned. Got both."
            raise UsageError(msg)
        if self.update != "none" and not kind.masked:
            msg = f"--update must be used with masks, whose other weights answer. Got granularity {kind}. Use --granularity element, 2:4, 4x1, …."
            raise UsageError(msg)
        self._check_reading(own)
        if own or (kind.kind == "layer" and dry_run):
            return
        if kind.kind == "layer":
            msg = "granularity layer must come with --drop MODULE, or with --dry-run, which lists what may be left out. Got neither."
            raise UsageError(msg)
        self._check_amount()

    def _check_reading(self, own: str) -> None:
        """Whether data was given where some is read, of the kind that is read, and only there."""
        criterion = self.criterion
        what = f"--criterion {criterion}" if criterion in (*OF_INPUTS, *OF_GRADIENTS) else ""
        what = what or ("--update obs" if self.update != "none" else "")
        if not what and criterion not in DATA_FREE:
            msg = (
                f"--criterion must be one of {', '.join(DATA_FREE)}, or with --task or --calibrate of {', '.join(OF_INPUTS)}, "
                f"or with --task of {', '.join(OF_GRADIENTS)}. Got {criterion!r}. compress knows those that are learnt in training."
            )
            raise UsageError(msg)
        if what and not self.reads:
            more = "" if criterion in OF_GRADIENTS else ", or --calibrate FILE.npz with inputs"
            msg = f"{what} must be given data: --task, as digits or path/to/task.py{more}. Got none. `paredown compress RECIPE` reads the recipe's task."
            raise UsageError(msg)
        if criterion in OF_GRADIENTS and self.reads == "--calibrate":
            msg = f"{what} must be given --task, whose step is the loss that it reads. Got --calibrate, which holds inputs alone."
            raise UsageError(msg)
        if self.reads and not what:
            by = own or f"--criterion {criterion}"
            msg = f"{self.reads} must come with a criterion that reads data, or with --update obs. Got {by}, which reads none."
            raise UsageError(msg)

    def _check_amount(self) -> None:
        kind, given = self.granularity, self.budget.given()
        wrong = "channels" if kind.masked else "density"
        if wrong in given:
            fix = "--granularity element, 2:4, 4x1, …" if wrong == "density" else "--density"
            msg = f"--{wrong} must not be given for granularity {kind}. Got {given[wrong]}. Use {fix}."
            raise UsageError(msg)
        if not given and kind.kind != "n:m":
            ways = "--density, --parameters or --macs" if kind.masked else "--macs, --parameters or --channels"
            msg = (
                f"prune must be given what remains: {ways}, as --{'density' if kind.masked else 'macs'} 0.5. Got none."
            )
            raise UsageError(msg)

    def plan(self, found: Loaded, coupling: Coupling, cost: Cost, source: reading.Source | None) -> Plan:
        """The plan, by whatever makes it."""
        import paredown

        program, made_by = found.program, {"verb": "prune"}
        if self.drop:
            return paredown.Plan(keep={}, drop_modules=self.drop, made_by=made_by)
        if self.masks == MODEL_MASKS:
            if found.masks is None:
                msg = "--masks model must be given a MODEL with masks of torch.nn.utils.prune. Got one without, or masks that keep all."
                raise UsageError(msg)
            return found.masks
        if self.masks is not None:
            return paredown.masks_of(program, self.masks, granularity=str(self.granularity))
        how, read = dict(self.how), dict[str, Any]()
        if source is not None and self.criterion not in DATA_FREE:
            read = {"batches": source.of(program)(), "loss": source.step, "num_batches": source.most}
            _refuse_no_step(self.criterion, source)
        scores = paredown.score(
            program, coupling, how.pop("criterion", "l1"), granularity=self.granularity, seed=self.seed,
            weights_given=found.weights != "random", **read,
        )  # fmt: skip
        try:
            return paredown.allocate(coupling, scores, cost, self.budget, target=self.target, **how)
        except InfeasibleError as error:
            _say_nearest(error, coupling, cost)
            raise

    def carried_out(
        self, program: Program, plan: Plan, before: Pruned | None, source: reading.Source | None, realiser: Any
    ) -> Pruned:
        """The plan on the model, proven; with --update the other weights answer."""
        import paredown

        if self.update == "none":
            return paredown.prune(program, plan, realiser=realiser, seed=self.seed)
        from paredown.prune.obs import obs_on_plan

        assert source is not None  # checked with the options
        choose = self.criterion == "obs" and before is None and self.granularity.kind in ("element", "n:m")
        return obs_on_plan(
            program, plan, source.of(program), choose=choose and self.masks is None, step=source.step, num_batches=source.most
        )  # fmt: skip


def _granularity(text: str | None, drop: tuple[str, ...], masks: Path | None) -> Granularity:
    from paredown.granularity import Granularity  # brings numpy, which --help can do without

    kind = Granularity.parse(text or ("layer" if drop else "element" if masks is not None else "channel"))
    if (drop and kind.kind != "layer") or (masks is not None and not kind.masked):
        msg = f"--granularity must be {'layer with --drop' if drop else 'one of masks with --masks'}. Got {kind}."
        raise UsageError(msg)
    return kind


def _refuse_no_step(criterion: str, source: reading.Source) -> None:
    if criterion in OF_GRADIENTS and source.step is None:
        msg = f"--criterion {criterion} must be given a task with step and train_batches. Got one with its own train alone."
        raise UsageError(msg)


def _carried_out(
    choice: _Choice, found: Loaded, before: Pruned | None, source: reading.Source | None, realiser: Any, out: Path | None,
    plot: Path | None, *, name: str, strict: bool, json: bool, quiet: bool,
) -> Callable[[], int]:  # fmt: skip
    """Plan, prune, prove, save; what is left to do is to tell it, on the stdout of the document. Without `out`: a dry run."""
    import paredown
    from paredown.records import whole_file

    program, seed = found.program, choice.seed
    if choice.granularity.kind == "layer" and not choice.drop:
        return partial(_candidates, program, json=json, quiet=quiet)
    coupling = paredown.couple(program, strict=strict)
    cost = paredown.examine(program, strict=strict, model=name)
    plan = choice.plan(found, coupling, cost, source)
    asked = Asked(
        found=found,
        coupling=coupling,
        cost=cost,
        plan=plan,
        granularity=str(choice.granularity),
        json=json,
        quiet=quiet,
    )
    if plan.made_by.get("already_met"):
        return asked.already_met
    if out is None:
        counted: Cost | None = None
        notes: tuple[str, ...] = ()
        if plan.drop_modules:  # what leaves with a module is known once it is left out
            tried = paredown.prune(program, plan, realiser=realiser, seed=seed)
            counted, notes = paredown.examine(paredown.capture(tried.module, program.inputs, train=False)), tried.notes
        return partial(asked.dry_run, counted, notes)
    say("prune and prove", quiet=quiet or json)
    level = choice.carried_out(program, plan, before, source, realiser)
    result = level if before is None else paredown.compose(before, level, seed=seed)
    figure = (
        None if plot is None else paredown.mask_picture(level)
    )  # before anything is written: it may miss matplotlib
    paredown.save(result, out)
    if figure is not None and plot is not None:
        with whole_file(plot) as temporary:
            figure.savefig(temporary, format=plot.suffix[1:].lower())
    return partial(asked.done, level, result, out, plot)


def _candidates(program: Program, *, json: bool, quiet: bool) -> int:
    from paredown.prune import depth_candidates

    candidates = depth_candidates(program)
    if json:
        emit(candidates_document(candidates))
    elif candidates:
        show(candidates_table(candidates), "Name them with --drop.", quiet=quiet)
    else:
        show("No residual block: no module whose input reaches its output past its weights.", quiet=quiet)
    return 0


def _check_places(
    out: Path | None, plot: Path | None, model: str, read: Mapping[str, Path | None], *, dry_run: bool, overwrite: bool
) -> None:
    """Where results go, before anything is loaded."""
    if dry_run:
        if plot is not None:
            msg = f"--plot must be given without --dry-run, which writes nothing. Got {str(plot)!r}."
            raise UsageError(msg)
        return
    if out is None:
        msg = "prune must be given --out, a new folder, or --dry-run. Got neither."
        raise UsageError(msg)
    inputs = {"model": model.rpartition(":")[0], **{n: str(p or "") for n, p in read.items()}}
    check_out_folder(out, inputs, overwrite=overwrite)
    if plot is not None:
        if plot.suffix.lower() not in PICTURES:
            msg = f"--plot must end in one of {', '.join(PICTURES)}. Got {str(plot)!r}."
            raise UsageError(msg)
        check_out_file(plot, dict(inputs), overwrite=overwrite, option="--plot")


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
    if error.nearest is None or not (error.nearest.keep or error.nearest.masks):
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print("nearest plan that can be reached:", markup=False)
    for part in plan_tables(coupling, cost, error.nearest):
        console.print(part, markup=False)
