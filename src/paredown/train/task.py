"""Task: what a user knows about a model (data, step, measure), collected from one Python module.

A *batch* is whatever `step(model, batch)` understands, usually a tuple whose first element is the input tensor.
A *calibration batch* is inputs alone: a tensor, a tuple of args, or {"args": …, "kwargs": …}; where the module has
`batch_inputs(batch)`, calibration batches may be full batches and it takes the inputs out of them.
`predict(*inputs)` takes and returns CPU float32 tensors in the model's own structure, at any batch size.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError, UsageError
from paredown.program import call_inputs as call_inputs  # noqa: PLC0414  (it is this room's name for it as well)
from paredown.train.patience import BATCH_SECONDS, Patient
from paredown.train.shares import refuse_no_share

Batches = Callable[[], Iterable[Any]]
Step = Callable[[nn.Module, Any], Tensor]
Predict = Callable[..., Any]
Evaluate = Callable[[Predict], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What quality means: a name, its unit, and whether more is better."""

    name: str
    unit: str
    goal: Literal["max", "min"]

    def __post_init__(self) -> None:
        if self.goal not in ("max", "min"):
            msg = (
                f'a metric\'s goal must be "max" or "min". Got {self.goal!r} for {self.name!r}. paredown does not '
                "guess which is better."
            )
            raise UsageError(msg)

    def better(self, a: float, b: float) -> bool:
        """Whether a is strictly better than b."""
        return a > b if self.goal == "max" else a < b


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The user's functions under their fixed names; optional ones are None where the module lacks them."""

    name: str
    model: Callable[..., nn.Module]
    inputs: Callable[[], Any]
    calibration_batches: Batches
    evaluate: Evaluate
    """The metric on the test data: {metric name: number, or one number per sample}."""
    metric: Metric
    test_batches: Batches | None = None
    train_batches: Batches | None = None
    step: Step | None = None
    train: Callable[[nn.Module], nn.Module | None] | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    choose_batches: Batches | None = None
    """Training data held out of training: choices are made on it, never on test data."""
    choose: Evaluate | None = None
    """The metric on `choose_batches`, where `evaluate` takes `batches`."""
    base: Callable[..., nn.Module] | None = None
    """`base(seed=…, device=…, progress=…, checkpoint=…)` trains the model first, where no trained weights exist."""
    scratch: Callable[..., nn.Module] | None = None
    """`scratch(model, extra_epochs=…, seed=…)` trains a given untrained model as `base` does, and longer; of any widths."""
    twin: Callable[..., nn.Module] | None = None
    """`twin(parameters, seed=…)`: an untrained dense model of about that many parameters, to compare with."""
    slices: Callable[[], Mapping[str, Iterable[Any]]] | None = None
    """`slices()`: {column: one value per test sample, in evaluate's order}. The report says for which values the metric changed.
    The column "id" names samples; "target", in the unit of the network's one output, gives bias and scatter."""
    normalisation: str = ""
    """One line for the report's snippet: how raw data becomes the model's input."""
    data: Path | None = None

    def __post_init__(self) -> None:
        for name in _ROLES:
            batches = getattr(self, name)
            if batches is not None and not isinstance(batches, Patient):
                object.__setattr__(self, name, Patient(batches, name))


_ROLES = ("calibration_batches", "test_batches", "train_batches", "choose_batches")
_REQUIRED = ("model", "inputs", "calibration_batches", "evaluate")
_OPTIONAL = (
    "test_batches",
    "train_batches",
    "step",
    "train",
    "optimizer",
    "choose_batches",
    "base",
    "scratch",
    "twin",
    "slices",
)


def task_from_module(module: ModuleType, *, data: Path | str | None = None) -> Task:
    """Collect a task from a Python module; a function that has a parameter `data` gets it.

    Required: `model`, `inputs`, `calibration_batches`, `evaluate`, `METRIC = {"name", "unit", "goal"}`, and either
    `train_batches` with `step`, or `train`. An `evaluate(predict, batches)` gets `test_batches()`; it then also
    serves `choose_batches()`. Optional: `batch_inputs`, `optimizer`, `base`, `scratch`, `twin`, `slices`, `NORMALISATION`,
    and `BATCH_SECONDS`, the longest wait for one batch.

    Raises UsageError (a function or METRIC is missing or malformed, or one needs `data` and there is none).
    """
    where = getattr(module, "__file__", None) or module.__name__
    folder = Path(data) if data is not None else None
    missing = [n for n in _REQUIRED if not callable(getattr(module, n, None))]
    trains = callable(getattr(module, "train", None)) or all(
        callable(getattr(module, n, None)) for n in ("train_batches", "step")
    )
    if missing or not trains:
        wanted = [*missing, *([] if trains else ["train_batches and step, or train"])]
        msg = (
            f"a task module must have the functions {', '.join(wanted)}. Got none of that name at {where}. `paredown "
            "init` writes an example."
        )
        raise UsageError(msg)
    found: dict[str, Any] = {}
    for name in (*_REQUIRED, *_OPTIONAL):
        function = getattr(module, name, None)
        if callable(function):
            found[name] = _with_data(function, folder, where)
    _check_data_is_used(module, folder, where)
    longest = _seconds(module, where)
    for name in _ROLES:
        if name in found:
            found[name] = Patient(found[name], name, longest)
    batch_inputs = getattr(module, "batch_inputs", None)
    if batch_inputs is not None:
        full = found["calibration_batches"]
        found["calibration_batches"] = lambda: (batch_inputs(batch) for batch in full())
    found.update(_evaluations(found, where))
    return Task(
        name=module.__name__.rsplit(".", 1)[-1],
        metric=_metric(module, where),
        normalisation=str(getattr(module, "NORMALISATION", "")),
        data=folder,
        **found,
    )


def predictor(module: nn.Module) -> Predict:
    """`predict(*inputs)` of a torch module: eval mode, no gradients, CPU tensors; the module's own mode is put back."""

    def predict(*args: Any, **kwargs: Any) -> Any:
        modes = [(m, m.training) for m in module.modules()]
        module.eval()
        try:
            with torch.no_grad():
                return pytree.tree_map(_cpu, module(*args, **kwargs))
        finally:
            for part, mode in modes:
                part.training = mode

    return predict


def metric_values(metric: Metric, result: Any) -> tuple[float, np.ndarray | None]:
    """What `evaluate` returned, as (value, one float64 per sample or None); value = mean over samples.

    Raises UsageError (no such name, text, None, more than one axis) and RejectedError (NaN, infinity, no samples, an accuracy above 100 %).
    """
    if not isinstance(result, Mapping) or metric.name not in result:
        got = sorted(result) if isinstance(result, Mapping) else type(result).__name__
        msg = f"evaluate must return a dict with {metric.name!r}. Got {got}. METRIC names what evaluate returns."
        raise UsageError(msg)
    value = result[metric.name]
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        if isinstance(value, str | bytes | bool) or value is None:
            raise TypeError
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = (
            f"the metric {metric.name!r} must be a number or one number per sample. Got {value!r} "
            f"({type(value).__name__}) from evaluate."
        )
        raise UsageError(msg) from error
    if numbers.ndim > 1:
        msg = (
            f"the metric {metric.name!r} must be a number or one number per sample. Got an array of shape "
            f"{numbers.shape} from evaluate."
        )
        raise UsageError(msg)
    if numbers.size == 0 or not np.isfinite(numbers).all():
        got = (
            "no samples"
            if numbers.size == 0
            else f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} NaN or infinite"
        )
        msg = (
            f"the metric {metric.name!r} must be finite. Got {got} from evaluate. Look for empty test data or a "
            "division by zero."
        )
        raise RejectedError(msg)
    refuse_no_share(metric, numbers)
    return float(numbers.mean()), numbers if numbers.ndim else None


# ----------------------------------------------------------------------------------------------------------- randomness


@contextmanager
def kept_randomness() -> Iterator[None]:
    """The global random states of torch (on a GPU in use too), numpy and random are as before when the block ends."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  (user code draws from the global states)
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def seed_all(seed: int) -> None:
    """Seed torch, numpy and random: a user's augmentation may draw from any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the user's augmentation draws from the global state)
    random.seed(seed)


def stream(seed: int, *numbers: int) -> int:
    """A seed for one part of what a seed decides; parts of neighbouring seeds have nothing in common, as seed + number has.

    >>> len({stream(seed, epoch) for seed in range(10) for epoch in range(100)})
    1000
    """
    drawn = np.random.SeedSequence([seed % 2**64, *numbers]).generate_state(1)
    return int(drawn[0]) & 0x7FFFFFFF


def first_tensor(batch: Any) -> Tensor:
    """The tensor whose axis 0 counts the samples of a batch. Raises RejectedError where it holds none."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            return leaf
        if isinstance(leaf, np.ndarray):
            return torch.as_tensor(leaf)
    if isinstance(batch, Mapping):  # mappings that pytree does not know, as a tokenizer's
        return first_tensor(dict(batch))
    msg = f"a batch must hold a tensor. Got {type(batch).__name__}. The first tensor's axis 0 counts the samples."
    raise RejectedError(msg)


def _cpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() else value


# ----------------------------------------------------------------------------------------------------- reading a module


def _seconds(module: ModuleType, where: str) -> float:
    value = getattr(module, "BATCH_SECONDS", BATCH_SECONDS)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        msg = f"BATCH_SECONDS must be a number above 0. Got {value!r} at {where}."
        raise UsageError(msg)
    return float(value)


def _with_data(function: Callable[..., Any], data: Path | None, where: str) -> Callable[..., Any]:
    """The function with `data` bound, where it has such a parameter."""
    parameter = _parameters(function).get("data")
    if parameter is None:
        return function
    if data is None:
        if parameter.default is not inspect.Parameter.empty:
            return function
        msg = (
            f"{function.__name__} must be given `data`, the folder it reads. Got no `data` at {where}. Add `data: DIR` "
            "to the recipe or `--set data=DIR`."
        )
        raise UsageError(msg)

    def bound(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{"data": data, **kwargs})

    bound.__signature__ = inspect.Signature([p for n, p in _parameters(function).items() if n != "data"])  # type: ignore[attr-defined]
    bound.__name__ = function.__name__
    return bound


def _check_data_is_used(module: ModuleType, data: Path | None, where: str) -> None:
    functions = [getattr(module, n, None) for n in (*_REQUIRED, *_OPTIONAL)]
    if data is not None and not any("data" in _parameters(f) for f in functions if callable(f)):
        msg = (
            f"`data` must be read by a function of the task module. Got {str(data)!r}, and none takes a parameter "
            f"`data` at {where}. Leave it out."
        )
        raise UsageError(msg)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins and some C callables have no signature: they take no `data`
        return {}


def _evaluations(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    evaluate = found["evaluate"]
    if "batches" not in _parameters(evaluate):
        return {}
    test, choose = found.get("test_batches"), found.get("choose_batches")
    if test is None:
        msg = (
            f"evaluate(predict, batches) must have test_batches() to run on. Got none at {where}. Add it, or take "
            "`batches` out of evaluate."
        )
        raise UsageError(msg)
    return {
        "evaluate": lambda predict: evaluate(predict, batches=test()),
        "choose": None if choose is None else lambda predict: evaluate(predict, batches=choose()),
    }


def _metric(module: ModuleType, where: str) -> Metric:
    given = getattr(module, "METRIC", None)
    fix = (
        'Write METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}; paredown does not guess which direction is '
        "better."
    )
    if isinstance(given, Metric):
        return given
    if not isinstance(given, Mapping) or set(given) != {"name", "unit", "goal"}:
        msg = f"a task module must declare METRIC with name, unit and goal. Got {given!r} at {where}. {fix}"
        raise UsageError(msg)
    if given["goal"] not in ("max", "min"):
        msg = f'METRIC["goal"] must be "max" or "min". Got {given["goal"]!r} at {where}. {fix}'
        raise UsageError(msg)
    return Metric(name=str(given["name"]), unit=str(given["unit"]), goal=given["goal"])


def batch_length(batch: Any) -> int:
    """Samples in a batch: axis 0 of its first tensor, 1 where that has no axes."""
    tensor = first_tensor(batch)
    return int(tensor.shape[0]) if tensor.dim() else 1
