"""The fields of a recipe, room by room: names, rules, defaults and what they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from paredown.budget import Budget
from paredown.granularity import Granularity


def _amount(value: Any, info: ValidationInfo) -> Any:
    """One rule for all amounts: that of Budget."""
    if value is None:
        return None
    name = str(info.field_name)
    return getattr(Budget(**{name: value}), name)


class Strict(BaseModel):
    """Nothing unknown, nothing converted, nothing changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


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
    """Low rank instead of removal: parameters or macs are reached by the ranks of this method."""

    @model_validator(mode="after")
    def _given(self) -> Level:
        given = self.model_dump(exclude_none=True, exclude={"granularity", "factorize"})
        alone = {"channels", "density", "modules"} & given.keys()
        if alone and len(given) > 1:
            msg = f"a level must give channels, density or modules alone, or parameters, macs or both. Got {' and '.join(given)}."
            raise ValueError(msg)
        if self.factorize is not None and alone:
            msg = f"a level with factorize must give parameters or macs. Got {' and '.join(given)}."
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


class Prune(Strict):
    """What leaves, in how many levels."""

    granularity: str = Field(default="channel", max_length=40)
    """channel, head: removed physically; element, "2:4", row, column, kernel, 4x1: masks; layer: whole modules."""
    criterion: str = Field(default="l1", min_length=1, max_length=40)
    """What makes a channel or a weight important: a name of the table of criteria (`paredown.score`), or one that is learnt
    in the training: movement, soft_movement, sr_ste, accumulated_movement, gradient_drift (masks), gates (channels)."""
    criterion_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options of the criterion, and of every one: group, bias, reduction, member_norm (see `paredown.score`)."""
    allocation: Literal["uniform", "global", "erk", "sensitivity", "greedy", "knapsack"] = "uniform"
    """uniform keeps one ratio of every space or layer; global ranks all of the model; erk (masks) by layer size; the
    others measure first how far the outputs move on calibration data when one space or layer alone keeps less."""
    normalize: Literal["mean", "max", "none", "size"] | None = None
    """What a global ranking divides the scores of a space or layer by; null: mean for units, none for masks."""
    schedule: Literal["one-shot", "iterative", "gradual", "lottery", "rigl", "set"] = "one-shot"
    """How a mask comes about in the training of its level: at once, in steps with recovery between, cubically, by whole
    trainings with a rewind between, or moving at constant density."""
    schedule_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Options of the schedule, as rounds or rewind_step (see `paredown.prune.schedule`)."""
    regularize: Literal["none", "growing", "slimming"] = "none"
    """A training with a penalty on coupled units (growing) or batch-norm scales (slimming) before channels leave, as long
    as the recovery."""
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
        """The level's own granularity, or that of all levels; channels where an amount only fits those."""
        return level.granularity or self.granularity

    @model_validator(mode="after")
    def _amounts_fit(self) -> Prune:
        for number, level in enumerate(self.levels, start=1):
            kind = Granularity.parse(self.granularity_of(level))
            masked = kind.masked and level.factorize is None
            wanted = "density" if masked else "modules" if kind.kind == "layer" else "channels, parameters or macs"
            units = level.channels is not None or level.parameters is not None or level.macs is not None
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
    """The dense model as teacher: kl for logits, mse for regression, none for no teacher."""
    temperature: float = Field(default=4.0, gt=0)
    """Of the kl distillation."""
    distil_weight: float = Field(default=0.9, ge=0, le=1)
    """Loss = (1 - distil_weight) × step + distil_weight × distillation; no effect with distil: none."""
    batch_norm_batches: int = Field(default=100, ge=0)
    """Training batches that re-estimate batch norm at the end of a level; 0 skips it."""


class Quantize(Strict):
    """Static INT8 after the last level."""

    scheme: Literal["int8"] = "int8"
    """Weights int8 per output channel, activations 8 bits per tensor, as the target wants them."""
    observer: Literal["minmax", "moving-average", "percentile", "mse", "entropy"] = "mse"
    """How the range of an activation is chosen: all values seen, moving averages of the batches' ranges, 99.99 % of the
    values, least squared error, or least KL divergence (not for outputs of sigmoid or softmax)."""
    samples: int | None = Field(default=None, ge=1)
    """Calibration samples at most; null takes all that the task gives."""
    repair: list[Literal["equalize", "smooth", "gptq", "adaround", "blocks", "bias", "bias-fast"]] = []
    """What is done against the rounding: ranges moved between layers, codes chosen by what they do to the output, means given
    back. The samples and their activations are kept in memory."""
    float_layers: list[str] = []
    """Patterns of parameters or modules that stay in float."""
    spare: bool = False
    """Put the fewest layers back to float for which the metric on the task's choose_batches keeps budget.metric_loss."""
    epochs: int = Field(default=0, ge=0)
    """Of quantization-aware training, from the calibrated network; 0 leaves it out. The dense network distils."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of that training, falling to 0 as a cosine."""


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


class Bounds(Strict):
    """What the recommended file must keep; a bound that does not hold ends with exit code 5 (metric) or 4."""

    metric_loss: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Largest loss of the metric against the dense FP32 file, in the metric's own unit."""
    size_bytes: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Fraction of the dense file's bytes, or bytes, or a text such as "30 MB" (10⁶) or "30 MiB" (2²⁰)."""
    latency_ms: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Median latency of one sample on this machine, milliseconds."""
    peak_ram_bytes: Annotated[float | int | None, BeforeValidator(_amount)] = None
    """Peak memory of the process that runs the file: bytes, or a text such as "200 MB"."""
