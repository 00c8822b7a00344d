"""The fields of a recipe, room by room: names, rules, defaults and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from paredown.budget import Budget, parse_latency
from paredown.granularity import Granularity


def _amount(value: Any, info: ValidationInfo) -> Any:
    """One rule for all amounts: that of Budget."""
    if value is None:
        return None
    name = str(info.field_name)
    return getattr(Budget(**{name: value}), name)


def _latency(value: Any) -> Any:
    """A fraction, or a text with its unit."""
    if value is not None:
        parse_latency(value)
    return value


class Strict(BaseModel):
    """Nothing unknown, nothing converted, nothing changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


STREAMS = 2
"""How a seed becomes random numbers: what was trained by another number saw other draws, and is not continued. 1 was seed + epoch."""


class Level(Strict):
    """One level of pruning. Amounts are what remains of the model that the level starts from."""

    channels: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction of the channels of each space that remains. Stands alone."""
    parameters: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction (or number, an integer ≥ 2) of parameters that remains."""
    macs: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction (or number) of multiply-accumulates of one sample that remains (FLOPs = 2 × MACs)."""
    density: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction (or number) of weights that are not zero: a mask of the granularity. Stands alone; N:M needs none."""
    modules: int | None = Field(default=None, ge=1)
    """How many of the modules that may be left out (residual blocks) remain: depth, by block influence on the calibration
    data. Stands alone."""
    granularity: str | None = Field(default=None, max_length=40)
    """Of this level, where it is not that of prune."""
    factorize: Literal["svd", "asvd", "svd_llm", "spatial_svd", "tucker2"] | None = None
    """Low rank instead of removal: parameters or macs, one of them, are reached by the ranks of this method."""
    energy: float | None = Field(default=None, gt=0, lt=1)
    """Share of Σσ² that every layer keeps, with factorize: its ranks are the least that do. Stands alone."""
    masks: str | None = Field(default=None, min_length=1, max_length=4096)
    """File of your own masks (relative to the recipe): .safetensors or .npz, one array of 0 and 1 per parameter, 1 is kept, in
    the shapes that the level starts from. What the file lacks stays. Stands alone; the granularity, element where that of prune
    is none of masks, is checked: whole cells."""
    masks_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Filled in, with masks: a run is not continued with other ones. Where given, it must fit the file."""
    epochs: int | None = Field(default=None, ge=0)
    """Of this level's training; null: recover.epochs."""

    @model_validator(mode="after")
    def _given(self) -> Level:
        given = self.model_dump(exclude_none=True, exclude={"granularity", "factorize", "epochs", "masks_sha256"})
        if self.masks is None and self.masks_sha256 is not None:
            msg = f"masks_sha256 must come with masks, the file it is of. Got {self.masks_sha256} alone."
            raise ValueError(msg)
        if self.masks is not None and (self.factorize is not None or len(given) > 1):
            others = ["factorize"] if self.factorize is not None else [n for n in given if n != "masks"]
            msg = f"masks must stand alone in a level, whose amount they are. Got them with {' and '.join(others)}."
            raise ValueError(msg)
        if self.energy is not None and (self.factorize is None or len(given) > 1):
            got = f"it with {' and '.join(n for n in given if n != 'energy')}" if len(given) > 1 else "no factorize"
            msg = f"energy must stand alone in a level with factorize, whose ranks it decides. Got {got}."
            raise ValueError(msg)
        alone = {"channels", "density", "modules"} & given.keys()
        if alone and len(given) > 1:
            msg = f"a level must give channels, density or modules alone, or parameters, macs or both. Got {' and '.join(given)}."
            raise ValueError(msg)
        if self.factorize is not None and (alone or len(given) > 1):
            msg = (
                f"a level with factorize must give parameters, macs or energy, one of them. Got {' and '.join(given)}."
            )
            raise ValueError(msg)
        return self

    @field_validator("granularity")
    @classmethod
    def _readable(cls, granularity: str | None) -> str | None:
        return granularity if granularity is None else str(Granularity.parse(granularity))


class Base(Strict):
    """How the dense model is trained where the task brings no trained weights but a `base` function."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training data; null leaves it to the task."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate; null leaves it to the task."""


IN_TRAINING = ("movement", "soft_movement", "sr_ste", "accumulated_movement", "gradient_drift", "gates")
"""Criteria that are learnt, or added up, while the model trains."""


class Prune(Strict):
    """What leaves, in how many levels."""

    granularity: str = Field(default="channel", max_length=40)
    """channel, head: removed physically; element, "2:4", row, column, kernel, 4x1: masks; layer: whole modules."""
    criterion: str = Field(default="l1", min_length=1, max_length=40)
    """What makes a channel or a weight important: a name of the table of criteria (`paredown.score`), or one that is learnt
    in the training: movement, soft_movement, sr_ste, accumulated_movement, gradient_drift (masks), gates (channels)."""
    criterion_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options of the criterion, and of every one: group, bias, reduction, member_norm (see `paredown.score`)."""
    allocation: Literal["uniform", "global", "erk", "sensitivity", "greedy", "knapsack"] | None = None
    """uniform keeps one ratio of every space or layer; global ranks all of the model; erk (masks) by layer size; the
    others measure first how far the outputs move on calibration data when one space or layer alone keeps less. null: uniform,
    but for masks that are chosen in a training or in rounds global (erk for movement, accumulated_movement and
    gradient_drift; uniform for wanda and N:M)."""
    sensitivity: str | None = Field(default=None, max_length=4096)
    """Folder that `paredown sensitivity` wrote for this network (relative to the recipe): those allocations take its output
    distances on held-out data and measure nothing."""
    normalize: Literal["mean", "max", "none", "size"] | None = None
    """What a global ranking divides the scores of a space or layer by; null: mean for units, none for masks."""
    schedule: Literal["one-shot", "iterative", "gradual", "lottery", "rigl", "set"] = "one-shot"
    """How a mask comes about in the training of its level: at once, in steps with recovery between, cubically, by whole
    trainings with a rewind between, or moving at constant density."""
    schedule_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options of the schedule, as rounds or rewind_step (see `paredown.prune.schedule`). one-shot has rounds, too: scored anew
    and masked further as often, before the training (SynFlow wants 100)."""
    regularize: Literal["none", "growing", "slimming"] = "none"
    """A training with a penalty on coupled units (growing) or batch-norm scales (slimming) before channels leave, as long
    as the recovery."""
    regularize_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options of the penalty: most, ramp, chosen (growing), strength (slimming), epochs (see `paredown.prune.regularize`)."""
    update: Literal["none", "obs"] = "none"
    """How the weights that stay answer for those that a mask takes at once. obs is SparseGPT: layer after layer on training
    batches (calibration inputs, where the task has its own `train`), before any recovery. With criterion obs (element, N:M)
    its sweep also says which weights leave, as many of each layer as the allocation gives."""
    update_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options of the update: block, damping (see `paredown.prune.obs`)."""
    reconstruct: bool = False
    """After a removal, fit the weights that read the removed channels by least squares to the dense outputs."""
    levels: tuple[Level, ...] = ()
    """One entry per level; each level is followed by recovery. Empty: nothing is pruned."""
    include: tuple[str, ...] = ()
    """Patterns (* and ?) on parameter, module and space names; empty means all. exclude wins over include."""
    exclude: tuple[str, ...] = ()
    """Patterns of what is never pruned. A pattern that matches nothing is an error."""
    align: int | None = Field(default=None, ge=1)
    """Kept channels are a multiple of this; null takes the target's, 1 turns it off."""
    floor: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of each space or layer that always remains; null: 0.1 for units (never less than one), 0.01 for masks that
    are ranked across layers."""
    realiser: Literal["auto", "module", "graph"] = "auto"
    """module keeps your own class, graph rebuilds the model from its graph; auto takes the module where it is proven."""
    score_batches: int = Field(default=16, ge=1)
    """Training batches that a criterion which needs data, a reconstruction or an update reads."""

    @field_validator("granularity")
    @classmethod
    def _readable(cls, granularity: str) -> str:
        return str(Granularity.parse(granularity))

    def granularity_of(self, level: Level) -> str:
        """The level's own granularity, or that of all levels; elements for one's own masks where that is none of masks."""
        of_all = self.granularity if level.masks is None or Granularity.parse(self.granularity).masked else "element"
        return level.granularity or of_all

    def usual_allocation(self, level: Level) -> Literal["uniform", "global", "erk"]:
        """What null is at a level: the default of `paredown.sparsify` where masks come about in a training or in rounds.

        By names, since recipes are read without torch; a test holds them to the library's own.
        """
        cut = Granularity.parse(self.granularity_of(level))
        at_once = self.schedule == "one-shot" and self.criterion not in IN_TRAINING and not self.in_rounds
        at_once = at_once or level.factorize is not None or level.masks is not None
        if not cut.masked or cut.kind == "n:m" or at_once or self.criterion == "wanda":
            return "uniform"
        return "erk" if self.criterion in ("movement", "accumulated_movement", "gradient_drift") else "global"

    @property
    def in_rounds(self) -> bool:
        """Whether one-shot masks are chosen in several rounds."""
        return self.schedule == "one-shot" and self.schedule_options.get("rounds", 1) != 1

    @model_validator(mode="after")
    def _amounts_fit(self) -> Prune:
        for number, level in enumerate(self.levels, start=1):
            kind = Granularity.parse(self.granularity_of(level))
            if level.masks is not None and not kind.masked:
                msg = f"level {number} must have a granularity of masks, since it gives masks. Got {kind}. Leave it out, or write row."
                raise ValueError(msg)
            if level.masks is not None:
                continue
            masked = kind.masked and level.factorize is None
            wanted = "density" if masked else "modules" if kind.kind == "layer" else "channels, parameters or macs"
            units = any(getattr(level, n) is not None for n in ("channels", "parameters", "macs", "energy"))
            given = (
                level.density is not None if masked else level.modules is not None if kind.kind == "layer" else units
            )
            other = (level.density is not None and not masked) or (level.modules is not None and kind.kind != "layer")
            brings_its_own = masked and (kind.kind == "n:m" or self.criterion == "soft_movement")
            if other or given == brings_its_own:
                wanted = "no amount" if brings_its_own else wanted
                got = level.model_dump(exclude_none=True)
                msg = f"level {number} must give {wanted}, as its granularity is {kind}. Got {got}."
                if not got:
                    msg = "a level must give channels, density or modules alone, or parameters, macs or both. Got none."
                raise ValueError(msg)
        return self


class Recover(Strict):
    """Training after each level, on the task's `step` or its own `train`."""

    epochs: int = Field(default=3, ge=0)
    """Passes over the training data per level; 0 only re-estimates batch norm. Not used with the task's own `train`."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate at the start. An `optimizer` of the task keeps its own."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Used where the task has no `optimizer` of its own."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """L2 penalty (sgd) or decoupled decay (adamw)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate changes over a level."""
    distil: Literal["none", "kl", "mse"] = "kl"
    """The dense model as teacher: kl for logits, mse for regression, none for no teacher. Left out, with a note, where that
    model is known to be untrained."""
    temperature: float = Field(default=4.0, gt=0)
    """Of the kl distillation."""
    distil_weight: float = Field(default=0.9, ge=0, le=1)
    """Loss = (1 - distil_weight) × step + distil_weight × distillation; no effect with distil: none."""
    distil_layers: list[str] = []
    """Patterns of modules whose outputs are held to the dense model's too. Their channels must stay: as blocks, where
    only inner channels leave. Not with distil: none, and not in training with rounding."""
    distil_layers_weight: float = Field(default=10.0, ge=0)
    """Distillation = that of the outputs + distil_layers_weight × mean over layers of the relative squared error."""
    max_steps: int | None = Field(default=None, ge=1)
    """Steps of an epoch at most, also in training with rounding; needed where train_batches has no end."""
    batch_norm_batches: int = Field(default=100, ge=0)
    """Training batches that re-estimate batch norm at the end of a level; 0 skips it."""
    ranks: int = Field(default=1, ge=1, le=64)
    """Processes of this machine that share every batch of a level's training, started by torchrun; with device cuda a GPU each.
    Not for masks that change in training, nor for the task's own `train`."""

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Recover:
        if self.distil_layers and self.distil == "none":
            msg = f"distil_layers must come with distil kl or mse. Got {self.distil_layers} with distil none."
            raise ValueError(msg)
        return self


CLASHING_REPAIRS = (
    *(("gptq", "adaround"), ("gptq", "blocks"), ("adaround", "blocks"), ("bias", "bias-fast")),
    *((rounding, "bias-fast") for rounding in ("gptq", "adaround", "blocks")),
    ("blocks", "bias"),
)
"""Of which the one does the work of the other: what rounds by samples gives back the means as it goes, blocks those of whole
blocks. "bias" after gptq or adaround gives back those of all positions, where they have read some."""


def clash_of(repair: Sequence[str]) -> str:
    """What a list of repairs must not hold, and why; "" for one that is sound.

    >>> clash_of(["bias", "gptq"]), clash_of(["bias-fast", "gptq"])[:41]
    ('', "must not hold both 'gptq' and 'bias-fast'")
    """
    for one, other in CLASHING_REPAIRS:
        if one in repair and other in repair:
            return f"must not hold both {one!r} and {other!r}: each does the work of the other. Got {list(repair)}. Leave one out."
    return ""


class Quantize(Strict):
    """Codes instead of floats, after the last level."""

    scheme: Literal["int8", "w4a8", "w4a4", "int8-dynamic", "w4", "w2", "ternary", "binary", "fp16"] = "int8"
    """int8: weights 8 bits per output channel, activations 8 bits per tensor, as the target wants them. w4a8: weights 4 bits.
    w4a4: activations 4 bits too, in bytes that kernels of 8 bits compute with, so what they cost is measured and nothing is
    saved in time; 8 bits in the first and the last layer; for ONNX Runtime. int8-dynamic: activations by each
    tensor's own range at run time. w4, w2, ternary, binary: weights alone. fp16: weights in 16 bits. All but int8, w4a8 and fp16 are for ONNX Runtime."""
    observer: Literal["minmax", "moving-average", "percentile", "mse", "entropy"] = "mse"
    """How the range of an activation is chosen: all values seen, moving averages of the batches' ranges, 99.99 % of the
    values, least squared error, or least KL divergence (not for outputs of sigmoid or softmax)."""
    samples: int | None = Field(default=None, ge=1)
    """Calibration samples at most; null takes all that the task gives."""
    repair: list[Literal["equalize", "smooth", "gptq", "adaround", "blocks", "bias", "bias-fast"]] = []
    """What is done against the rounding: ranges moved between layers, codes chosen by what they do to the output (one of gptq,
    adaround and blocks, which give back the means of the positions that they read), means given back. The samples and their activations are kept in memory."""
    float_layers: list[str] = []
    """Patterns of parameters or modules that stay in float."""
    spare: bool = False
    """Put the fewest layers back to float for which the metric on the task's choose_batches keeps budget.metric_loss."""
    epochs: int = Field(default=0, ge=0)
    """Of quantization-aware training, from the calibrated network; 0 leaves it out. The dense network distils."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of that training, falling to 0 as a cosine."""

    @property
    def kernels(self) -> Literal["int8", "fp32"]:
        """What most layers of the file execute in, for tables of latency per layer."""
        return "int8" if self.scheme in ("int8", "w4a8", "w4a4") else "fp32"

    @model_validator(mode="after")
    def _can_be_done(self) -> Quantize:
        if self.scheme in ("int8-dynamic", "w4", "fp16"):
            asked = [n for n in ("repair", "spare", "epochs") if getattr(self, n)]
            if asked:
                msg = f"quantize.{asked[0]} must be left out for the scheme {self.scheme}, which reads no samples. Got {getattr(self, asked[0])!r}."
                raise ValueError(msg)
        if clash := clash_of(self.repair):
            msg = f"quantize.repair {clash}"
            raise ValueError(msg)
        return self


class DenseTwin(Strict):
    """A dense network of equal size, trained from scratch as long: the honest rival. Needs the task's `twin`."""

    enabled: bool = True
    """Train, quantize and measure it beside the pruned one."""


class Measure(Strict):
    """How latency is measured, in turns with the dense file."""

    threads: int = Field(default=1, ge=1, le=1024)
    """Threads of the runtime."""
    runs: int = Field(default=200, ge=5)
    """Readings at most."""
    seconds: float = Field(default=10.0, gt=0)
    """Time at most, seconds; whichever of runs and seconds ends first, but not before 5 readings."""
    noise: bool = False
    """Measure the metric of the dense and of the recommended file on disturbed pictures too: noise, blur and contrast in three
    strengths each, 20 evaluations."""
    known_metric: float | None = None
    """What the dense model is known to score, in the metric's unit; a run stops with exit code 5 where its file does not."""
    known_within: float | None = Field(default=None, ge=0)
    """How far from it is no difference, in the metric's unit; unset: 1 % of known_metric."""


def _memory(value: Any) -> Any:
    return Budget(peak_ram_bytes=value).peak_ram_bytes if isinstance(value, str) else value


class Trial(Strict):
    """What one trial may take; beyond it the trial is marked and the others go on."""

    seconds: float | None = Field(default=None, gt=0)
    """Time; null: no limit."""
    memory: Annotated[int | None, BeforeValidator(_memory)] = Field(default=None, ge=1)
    """Resident memory of its processes: bytes, or a text such as "4 GB"; null: no limit. Needs Linux. With device cuda the
    driver's and its libraries' count too, some gigabytes."""

    @property
    def limits(self) -> bool:
        """Whether there is any."""
        return self.seconds is not None or self.memory is not None


class Bounds(Strict):
    """What the recommended file must keep, and what is searched for; exit code 4 where it cannot be met, 5 for the metric.

    Where the model is foreseen to miss an amount after prune.levels (which may be empty), one more level is searched that
    meets it: the file is exported, measured, and the search corrected by what it measured.
    """

    metric_loss: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Largest loss of the metric against the dense FP32 file, in the metric's own unit."""
    channels: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction of the channels of each space that remains. Without prune.levels; stands alone among the amounts."""
    parameters: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction (or number, an integer ≥ 2) of the dense parameters."""
    macs: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction (or number) of the dense multiply-accumulates of one sample (FLOPs = 2 × MACs)."""
    density: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction (or number) of weights that are not zero: a mask. Without prune.levels; stands alone among the amounts."""
    size_bytes: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction of the dense file's bytes, or bytes, or a text such as "30 MB" (10⁶) or "30 MiB" (2²⁰)."""
    latency: Annotated[float | str | None, BeforeValidator(_latency)] = None
    """Median latency of one sample on this machine, on the runtime of `target` with measure.threads: a fraction of the dense FP32
    file timed in the same turns, or a text such as "12 ms"."""
    latency_ms: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """The same, milliseconds."""
    peak_ram_bytes: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Peak memory of the process that runs the file: bytes, or a text such as "200 MB"."""
    allocation: Literal["uniform", "global", "sensitivity", "greedy", "knapsack"] = "knapsack"
    """How the searched level spreads over the spaces, as in prune.allocation. Beside sensitivity, greedy and knapsack, which take each
    space alone, one share everywhere is tried too, but not where bits are searched together; of what holds the amounts the plan that moves
    the output less is taken."""
    bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(default=(8, 6, 4, 3, 2), min_length=1)
    """Widths that a weight may have where size_bytes is among the amounts, for ONNX Runtime: pruning and bits are then searched
    together. [8] leaves it to pruning."""
    low_rank: bool = True
    """Whether that search also tries low rank (svd) in the place of channels."""
    together: bool = False
    """Whether low rank, and channels followed by low rank, are tried for every amount: the one that moves the output least is
    taken. Without a training, which favours low rank (see trial_epochs)."""
    front: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = ()
    """Multiples of the amounts for which the search is done too: the report shows the front over them, with the keys of a recipe
    that make each point and its metric on choose_batches (trained for trial_epochs). [0.5, 0.7, 1.5, 2]: from half of what is asked to twice of it."""
    trials: int = Field(default=6, ge=0, le=10_000)
    """What it tries besides the network as it is: shares of the parameters with bits, else how far channels go before ranks."""
    trial_epochs: int = Field(default=0, ge=0)
    """Training of each trial; 0 fits the layers and measures batch norm anew, which is quick but harder on pruning than on bits."""
    trial: Trial = Trial()
    """What each of them may take; each then runs in a process of its own, which captures the network anew. Not in a notebook."""
    rounds: int = Field(default=6, ge=0, le=50)
    """Files that are exported and measured in a search, for each allocation, at most; 0 turns the search off: the bounds are only
    looked at."""

    @model_validator(mode="after")
    def _one_latency(self) -> Bounds:
        if self.latency is not None and self.latency_ms is not None:
            msg = f"budget must give latency or latency_ms. Got both, {self.latency!r} and {self.latency_ms!r}."
            raise ValueError(msg)
        alone = [n for n in ("channels", "density") if getattr(self, n) is not None]
        others = [n for n in (*SEARCHED, "channels", "density") if getattr(self, n) is not None and n not in alone[:1]]
        if alone and others:
            msg = f"budget.{alone[0]} must stand alone among the amounts. Got it with {', '.join(others)}."
            raise ValueError(msg)
        return self


SEARCHED = ("parameters", "macs", "size_bytes", "latency", "latency_ms", "peak_ram_bytes")
"""Keys of a budget that a search meets."""


class Method(Strict):
    """One way of pruning on a curve: what of `prune` it changes. A text alone names a criterion."""

    name: str | None = Field(default=None, min_length=1, max_length=60)
    """Of its line; null: the criterion and whatever else is given."""
    criterion: str | None = Field(default=None, min_length=1, max_length=40)
    """As in prune."""
    allocation: Literal["uniform", "global", "erk", "sensitivity", "greedy", "knapsack"] | None = None
    """As in prune."""
    granularity: str | None = Field(default=None, max_length=40)
    """As in prune."""
    regularize: Literal["none", "growing", "slimming"] | None = None
    """As in prune."""
    update: Literal["none", "obs"] | None = None
    """As in prune."""
    reconstruct: bool | None = None
    """As in prune."""
    factorize: Literal["svd", "asvd", "svd_llm", "spatial_svd", "tucker2"] | None = None
    """Low rank instead of removal, at every level."""

    @property
    def label(self) -> str:
        """What its line is called."""
        given = self.model_dump(exclude_none=True, exclude={"name"})
        own = {"reconstruct": "reconstruct" if self.reconstruct else "no reconstruction"}
        return self.name or ", ".join(str(own.get(k, v)) for k, v in given.items()) or "as the recipe"


class Controls(Strict):
    """What pruning must beat, at the same amounts and seeds."""

    kinds: tuple[Literal["scratch", "thin", "random"], ...] = ("scratch", "thin", "random")
    """scratch: the pruned shape from fresh weights, trained as long as base and recovery together; thin: a dense network of
    equal MACs, every layer narrowed alike, trained as long; random: the same pruning and recovery by a random criterion."""
    amounts: tuple[float | Literal["sweet-spot"], ...] | None = None
    """At which amounts of the curve they follow its first way of pruning; null: at all of them. "sweet-spot", and null: what is chosen
    gets those of its own way too, once the others are through."""
    epochs: int | None = Field(default=None, ge=1)
    """Training of scratch and thin where the task cannot repeat the training of its base (the verdict is then not comparable);
    null: the epochs of the task's scratch(), if it has one, and those of the recovery."""

    @property
    def at_sweet_spot(self) -> tuple[str, ...]:
        """Kinds of those of its own way that the chosen point gets."""
        return self.kinds if self.amounts is None or "sweet-spot" in self.amounts else ()

    def fixed(self, amounts: tuple[float, ...]) -> list[float]:
        """Those of a curve's amounts that have controls whatever is chosen."""
        return [a for a in (amounts if self.amounts is None else self.amounts) if not isinstance(a, str)]


def _fraction(amount: Any) -> Any:
    """One amount of a curve."""
    rule = "an amount must be a fraction in (0, 1): what remains"
    if isinstance(amount, str):
        msg = f"{rule}. Got the text {amount!r}.{' Write 25 % as 0.25.' if '%' in amount else ''}"
        raise ValueError(msg)
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < 1:
        hint = " Nothing would remain." if amount == 0 else " That is the dense model, which is always on the curve."
        msg = f"{rule}. Got {amount!r}.{hint if amount in (0, 1) and not isinstance(amount, bool) else ''}"
        raise ValueError(msg)
    return amount


def _method(method: Any) -> Any:
    return {"criterion": method} if isinstance(method, str) else method


class CurveGrid(Strict):
    """amounts × methods × schedules × seeds, for `paredown curve`."""

    amounts: tuple[Annotated[float, BeforeValidator(_fraction)], ...] = Field(max_length=1000)
    """Fractions that remain, in (0, 1). The dense model is always on the curve."""
    by: Literal["channels", "parameters", "macs", "density"] | None = None
    """What the amounts are of; null: density for masks, else channels."""
    methods: tuple[Annotated[Method, BeforeValidator(_method)], ...] = Field(default=(Method(),), max_length=100)
    """Criteria, or what else of `prune` differs; without it the recipe's own."""
    schedules: tuple[
        Literal["one-shot", "multi-level", "iterative", "gradual", "lottery", "rigl", "set", "from-scratch"], ...
    ] = ("one-shot",)
    """one-shot; multi-level: two levels with recovery between them; iterative: `rounds` of them (for masks the schedule of that
    name); gradual, lottery, rigl, set: masks only; from-scratch: chosen on fresh weights, trained as long as base and
    recovery together."""
    rounds: int = Field(default=4, ge=2, le=100)
    """Of iterative. All levels together train for recover.epochs."""
    spacing: Literal["geometric", "linear"] = "geometric"
    """What leaves in each level of multi-level and iterative: the same share of what it got, or the same part of the dense
    network (0.5 in two levels: 25 %, then 33 % of the rest)."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(default=(0, 1, 2), max_length=1000)
    """Each trains (or loads) a base of its own; with one seed no interval is available."""
    limit: float | None = Field(default=None, ge=0)
    """Largest loss of the metric against the dense file, in the metric's own unit (points, where that is %), on held-out
    training data. null: the point farthest from the chord of the mean curve."""
    axis: Literal["sparsity", "parameters", "bytes", "macs", "latency"] = "sparsity"
    """What a reduction is one of, for the choice; the report draws all that were measured."""
    latency: bool = False
    """Time every file, in turns with the dense one. Trials then run one at a time, unless --processes says otherwise."""
    quantized: bool = False
    """A second file of every model, dense and controls too, by the recipe's `quantize`: exported, checked and scored as the float
    one, on lines of its own; on the axes bytes and latency it takes part in the choice."""
    controls: Controls = Controls()
    trial: Trial = Trial()

    @field_validator("limit", mode="before")
    @classmethod
    def _in_its_unit(cls, limit: Any) -> Any:
        if isinstance(limit, str):
            msg = f"limit must be a number in the metric's own unit, as METRIC of the task declares it; for a metric in % these are points. Got {limit!r}."
            raise ValueError(msg)
        return limit

    @model_validator(mode="after")
    def _each_once(self) -> CurveGrid:
        named = {
            "amounts": self.amounts,
            "methods": [m.label for m in self.methods],
            "schedules": self.schedules,
            "seeds": self.seeds,
            "controls.kinds": self.controls.kinds,
        }
        for key, values in named.items():
            if not values and key != "controls.kinds":
                msg = f"curve.{key} must hold at least one. Got none: the grid is empty."
                raise ValueError(msg)
            twice = sorted({str(v) for v in values if list(values).count(v) > 1})
            if twice:
                msg = f"curve.{key} must give each cell once. Got {', '.join(twice)} more than once."
                raise ValueError(msg)
        strange = [a for a in self.controls.fixed(self.amounts) if a not in self.amounts]
        if strange:
            msg = f"curve.controls.amounts must be among curve.amounts {list(self.amounts)}, or sweet-spot. Got {strange}."
            raise ValueError(msg)
        if self.axis == "latency" and not self.latency:
            msg = "curve.axis latency must come with curve.latency: true, which times every file. Got false."
            raise ValueError(msg)
        return self
