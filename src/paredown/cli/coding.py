"""What `paredown quantize` does to a network: codes by calibration or by training, of several widths, or for most layers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.errors import InfeasibleError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paredown.cli.sources import Tuned
    from paredown.export import Predict
    from paredown.program import Program
    from paredown.prune import Pruned
    from paredown.quantize import Quantized
    from paredown.train import Progress, Task

NO_DATA = ("int8-dynamic", "w4", "fp16")
"""Schemes that read no samples (quantize.schemes.DYNAMIC and HALF, which would load torch); samples that are given check the file."""
WEIGHTS = ("w2", "ternary", "binary")
"""Schemes that need samples for a repair only (quantize.schemes.WEIGHTS)."""
ALONE = ("w4a4",)
"""Schemes whose packed weights are written by themselves where --out ends in PACKED, for kernels of 4 bits that are none of our targets'."""
PACKED = ".safetensors"
BITS = (8, 6, 4, 3, 2)
"""Widths that a layer may have unless others are asked for, as in a recipe."""
LR = 0.01
_FIRST_BATCHES = 100
_TASK = "--task, as digits or path/to/task.py, or the folder of a run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the options say of the codes. Names are those of the options; None stands for what was not given."""

    scheme: str
    target: str
    observer: str
    samples: int | None
    repair: Sequence[str]
    float_layers: Sequence[str]
    epochs: int | None = None
    lr: float | None = None
    distil: str | None = None
    max_steps: int | None = None
    teacher: Path | None = None
    spare: bool = False
    metric_loss: float | None = None
    size_bytes: str | None = None
    bits: Sequence[int] = ()

    @property
    def needless(self) -> bool:
        """Whether the codes are found without samples."""
        return self.scheme in NO_DATA or (self.scheme in WEIGHTS and not self.repair and not self.spare)

    def check(self, out: Path, *, has_task: bool) -> None:
        """All that can be refused before anything is loaded. Raises UsageError."""
        ways = {"--epochs": self.epochs, "--spare": self.spare, "--size-bytes": self.size_bytes}
        given = [name for name, value in ways.items() if value]
        if self.scheme in NO_DATA and given:
            msg = f"{given[0]} must be left out for the scheme {self.scheme}, which reads no samples and has one kernel for all layers. Got it. Take --scheme int8 or w4a8."
            raise UsageError(msg)
        self._check_training(has_task)
        self._check_spare(given, has_task)
        self._check_size()
        if out.suffix.lower() == PACKED and self.scheme not in ALONE:
            msg = f"--out must be the file that the target's runtime executes. Got {str(out)!r}. {PACKED} is for the scheme {' and '.join(ALONE)}."
            raise UsageError(msg)

    def _check_training(self, has_task: bool) -> None:
        if self.epochs is not None and self.epochs < 1:
            msg = f"--epochs must be an integer ≥ 1. Got {self.epochs}. Leave it out to train nothing."
            raise UsageError(msg)
        if self.epochs and not has_task:
            msg = (
                f"--epochs must come with {_TASK}: training batches and step(model, batch) are read there. Got neither."
            )
            raise UsageError(msg)
        of_training = {"--lr": self.lr, "--distil": self.distil, "--max-steps": self.max_steps}
        alone = [name for name, value in of_training.items() if value is not None]
        if alone and not self.epochs:
            msg = f"{alone[0]} must come with --epochs, the training that it is of. Got it alone."
            raise UsageError(msg)
        if self.teacher is not None and (not (self.epochs or self.spare) or self.distil == "none"):
            msg = f"--teacher must come with --epochs that distil, or with --spare, which compares with it. Got {str(self.teacher)!r} without."
            raise UsageError(msg)

    def _check_spare(self, given: Sequence[str], has_task: bool) -> None:
        if self.spare != (self.metric_loss is not None):
            have, miss = ("--spare", "--metric-loss") if self.spare else ("--metric-loss", "--spare")
            msg = f"{have} must come with {miss}: layers are put in float until the metric loses no more than that. Got {have} alone."
            raise UsageError(msg)
        if self.metric_loss is not None and not (math.isfinite(self.metric_loss) and self.metric_loss >= 0):
            msg = f"--metric-loss must be a number ≥ 0, in the metric's unit. Got {self.metric_loss}."
            raise UsageError(msg)
        if self.spare and len(given) > 1:
            other = next(name for name in given if name != "--spare")
            why = (
                "trains all layers on codes"
                if other == "--epochs"
                else "chooses how layers are quantized, as --spare does"
            )
            msg = f"--spare must go without {other}, which {why}. Got both. Do one of them, or name layers in --float-layers."
            raise UsageError(msg)
        if self.spare and not has_task:
            msg = f"--spare must come with {_TASK}: its metric on choose_batches is what must hold. Got neither."
            raise UsageError(msg)

    def _check_size(self) -> None:
        if self.bits and self.size_bytes is None:
            msg = f"--bits must come with --size-bytes, the file that these widths are chosen for. Got {list(self.bits)} alone. For one width everywhere: --scheme w4a8 or w2."
            raise UsageError(msg)
        if self.size_bytes is None:
            return
        if self.scheme != "int8" or not self.target.startswith("onnxruntime"):
            msg = f"--size-bytes must be met by bits per layer under --scheme int8 in a file for ONNX Runtime. Got {self.scheme} for {self.target}, whose layers have one width."
            raise UsageError(msg)
        if any(b not in range(1, 9) for b in self.bits) or (self.bits and min(self.bits) == max(self.bits) == 8):
            msg = f"--bits must be widths from 1 to 8, one below 8 among them. Got {list(self.bits)}."
            raise UsageError(msg)

    def check_task(self, task: Task | None) -> None:
        """Whether the task has what is read of it. Raises UsageError."""
        if self.epochs and (task is None or task.step is None or task.train_batches is None):
            msg = "--epochs must be given a task with step(model, batch) and train_batches. Got one that trains by itself. Add them, or leave --epochs out."
            raise UsageError(msg)
        if self.spare and (task is None or task.choose is None):
            msg = "--spare must be given a task with choose_batches and evaluate(predict, batches): test data choose nothing. Got one without. Add them, or name layers in --float-layers."
            raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A network in codes, and what is to be told of how it came about."""

    quantized: Quantized
    told: Mapping[str, Any]
    """For the document: "training", "spare", "size_bytes", of what was asked for."""
    notes: tuple[str, ...] = ()
    limit_bytes: int | None = None
    """Of the exported file."""

    def refuse_larger(self, size_bytes: int, files: Iterable[Path]) -> None:
        """A file that was weighed with the same bits has the same size; if not, it does not stay."""
        if self.limit_bytes is None or size_bytes <= self.limit_bytes:
            return
        for file in files:
            file.unlink(missing_ok=True)
        msg = f"size_bytes must be at most {self.limit_bytes:,} B. Got {size_bytes:,} B. Allow narrower --bits, or ask for more."
        raise InfeasibleError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What codes are made of."""

    asked: Asked
    tuned: Tuned
    task: Task | None
    batches: Any
    """Calibration inputs, in a form that can be gone through again."""
    seed: int
    device: str
    out: Path
    strip_prefix: str | None
    say: Callable[[str], None] = field(repr=False)

    @property
    def checkpoint(self) -> Path:
        """Of a training with rounding; there until the file is written."""
        return self.out.with_name(f"{self.out.name}.training.safetensors")

    def compared(self) -> Iterator[Any]:
        """The samples that the file is compared on: those of calibration, which leaves out what is not finite, and says so."""
        from torch.utils import _pytree as pytree

        from paredown.quantize.batches import each, finite_rows, length, rows

        def hidden(value: Any) -> Any:
            """Minus infinity in a mask is no fault."""
            return value.masked_fill(value == -math.inf, 0.0) if hasattr(value, "masked_fill") else value

        for call in each(self.batches):
            mask = finite_rows(pytree.tree_map(hidden, call))
            kept = call if self.tuned.found.program.batch != "dynamic" or bool(mask.all()) else rows(call, mask)
            if length(kept):
                yield {"args": kept[0], "kwargs": kept[1]}

    def coded(self) -> Coded:
        """The network in codes, by whichever way was asked for. Raises what `quantize`, `train_quantized` and `spare` raise."""
        import paredown
        from paredown.environments import python_of
        from paredown.quantize.static import refuse_target
        from paredown.target import named
        from paredown.train.task import seed_all

        asked = self.asked
        refuse_target(asked.scheme, named(asked.target))  # nobody should make an environment for what it does not have
        if self.out.suffix.lower() != PACKED and named(asked.target).environment:
            python_of(named(asked.target))  # now, not after a training
        seed_all(self.seed)
        options: dict[str, Any] = {
            "target": asked.target, "scheme": asked.scheme, "calibrate": None if asked.needless else self.batches,
            "observer": asked.observer, "num_samples": asked.samples, "repair": asked.repair, "float_layers": asked.float_layers,
        }  # fmt: skip
        told: dict[str, Any] = {}
        limit: int | None = None
        if asked.size_bytes is not None:
            limit, bits, size = self._bits(asked.size_bytes, options)
            told["size_bytes"] = size
            options |= {"bits": bits, "repair": _rounded(asked.repair)} if bits else {}
        if asked.spare:
            return self._spared(options)
        if asked.epochs:
            quantized, training, notes = self._trained(options)
            return Coded(quantized=quantized, told={**told, "training": training}, notes=notes, limit_bytes=limit)
        self.say("quantize")
        return Coded(quantized=paredown.quantize(self.tuned.thing, **options), told=told, limit_bytes=limit)

    # ------------------------------------------------------------------------------------------------------------ bits

    def _bits(self, text: str, options: Mapping[str, Any]) -> tuple[int, dict[str, int], dict[str, Any]]:
        """The limit in bytes, bits per layer for it (none where 8 everywhere hold it), and what to tell."""
        from tempfile import TemporaryDirectory

        from paredown.budget import Budget
        from paredown.cli.sources import number
        from paredown.export import export
        from paredown.pipeline.fitted import Weighing, fitted_bits, weighed

        wanted: Any = Budget(size_bytes=number(text)).size_bytes
        plain = {n: options[n] for n in ("target", "scheme", "calibrate", "float_layers")}
        plain |= {"observer": "minmax", "idle_repairs": True}  # files that are only weighed
        with TemporaryDirectory() as folder:
            file = Path(folder) / "weighed.onnx"
            if isinstance(wanted, float):
                wanted = math.floor(wanted * export(self.tuned.thing, file, target=self.asked.target).size_bytes)
            self.say("weigh the file with 8 bits")
            whole, shrinking = weighed(self.tuned.thing, plain, file, wanted, tuple(self.asked.bits) or BITS)
            bits: dict[str, int] = {}
            if whole > wanted:
                how = Weighing(
                    options=plain, repair=_rounded(self.asked.repair), path=file, say=self.say,
                    fix="Allow narrower --bits, ask for more, or prune first.",
                )  # fmt: skip
                bits = fitted_bits(self.tuned.thing, shrinking, how)
        return int(wanted), bits, {"asked": int(wanted), "with_8_bits": whole}

    # ----------------------------------------------------------------------------------------------------------- spare

    def _spared(self, options: Mapping[str, Any]) -> Coded:
        from dataclasses import replace

        from paredown.pipeline.spared import fewest_in_float, told

        assert self.task is not None and self.asked.metric_loss is not None  # checked with the options
        self.say("quantize, and look for the fewest layers in float")
        reference, name = self._reference()
        found, wanted = fewest_in_float(
            self.tuned.thing, reference, options, task=self.task, bound=self.asked.metric_loss
        )
        note = told(found, self.task.metric, wanted, name)
        spared = {
            "float_layers": list(found.float_layers), "extra_bytes": found.extra_bytes, "evaluations": found.tried,
            "before": found.before, "value": found.value, "reference": wanted, "bound": self.asked.metric_loss, "badge": "simulated",
        }  # fmt: skip
        return Coded(quantized=replace(found.quantized, notes=(*found.quantized.notes, note)), told={"spare": spared})

    def _reference(self) -> tuple[nn.Module, str]:
        """The network in float that the metric is compared with: the dense one where it is known, else what is quantized."""
        dense = self._dense()
        return (self.tuned.thing.module, "in float") if dense is None else (dense, "dense")

    def _dense(self) -> nn.Module | None:
        if self.asked.teacher is None:
            return self.tuned.dense
        from paredown.models import load_model

        return load_model(self.tuned.found.name, weights=self.asked.teacher, strip_prefix=self.strip_prefix or False)[
            0
        ].eval()

    # -------------------------------------------------------------------------------------------------------- training

    def _trained(self, options: Mapping[str, Any]) -> tuple[Quantized, dict[str, Any], tuple[str, ...]]:
        """As a recipe trains with rounding; a training that was stopped goes on from the checkpoint beside --out."""
        from paredown.quantize import train_quantized

        asked, task = self.asked, self.task
        assert task is not None and task.step is not None and task.train_batches is not None and asked.epochs  # checked
        teacher, name, notes = self._teacher()
        distil: Any = "none" if teacher is None else asked.distil or "kl"
        history: list[Any] = []

        def progress(now: Progress) -> None:
            for done in now.history[len(history) :]:
                history.append(done)
                loss = "not finite" if done.loss is None else f"{done.loss:.4g}"
                self.say(f"epoch {len(history)} of {now.epochs}: loss {loss}{', ' + done.note if done.note else ''}")

        self.say("quantize, and train with rounding")
        lr = LR if asked.lr is None else asked.lr
        quantized = train_quantized(
            self.tuned.thing, task.train_batches, step=task.step, epochs=asked.epochs, lr=lr, teacher=teacher, distil=distil,
            seed=self.seed, device=self.device, checkpoint=self.checkpoint, max_steps=asked.max_steps, progress=progress, **options,
        )  # fmt: skip
        rows = [
            {"epoch": e.epoch, "loss": e.loss, "lr": e.lr, "samples": e.num_samples, "note": e.note} for e in history
        ]
        training = {
            "epochs": asked.epochs,
            "lr": lr,
            "distil": distil,
            "teacher": name,
            "seed": self.seed,
            "history": rows,
        }
        return quantized, training, notes

    def _teacher(self) -> tuple[nn.Module | None, str | None, tuple[str, ...]]:
        """The dense network where it is known, else the network itself in float; none that is known to be untrained."""
        from paredown.pipeline.levels import newborn

        if self.asked.distil == "none":
            return None, None, ()
        dense = self._dense()
        if dense is not None:
            return dense, "dense", ()
        own = self.tuned.thing.module
        why = "its batch norms have never seen a batch" if newborn(own) else ""
        why = "no weights were given" if self.tuned.found.weights == "random" else why
        if why:
            return (
                None,
                None,
                (f"distillation was left out: the network, which would teach itself, is untrained ({why})",),
            )
        return own, "itself in float", ()


def _rounded(repair: Sequence[str]) -> list[str]:
    from paredown.pipeline.fitted import with_rounding

    return with_rounding(repair)


def evaluations(
    task: Task, thing: Program | Pruned, codes: Predict, calibration: Any
) -> tuple[dict[str, Any], list[str]]:
    """The task's metric of the network in float and in codes, and what is odd about the inputs of calibration beside those.

    On held-out data, where `evaluate` takes batches; else on what it evaluates on. `calibration` None: nothing was calibrated.
    Raises RejectedError where an evaluate that reads data of its own reads what was calibrated on.
    """
    from paredown.export import predictor
    from paredown.measure import evaluated
    from paredown.measure.watched import Watch, another_range, range_of
    from paredown.pipeline.unchanged import unchanged
    from paredown.quantize.batches import each
    from paredown.train.roles import Remembered, content_hashes

    evaluate, metric = task.choose or task.evaluate, task.metric
    watch = Watch(predictor(thing))
    read = Remembered(watch)
    with unchanged([thing.module]):
        in_float = evaluated(evaluate, read)
    told = list[str]()
    if calibration is not None and task.choose is None:
        called = ({"args": args, "kwargs": kwargs} for args, kwargs in each(calibration))
        told = read.refuse(content_hashes(called, like=task.inputs()), "calibration batches")
    values = [float(found[metric.name].mean()) for found in (in_float, evaluated(evaluate, codes))]
    odd = told + ([] if calibration is None else list(another_range(range_of(_tensors(calibration)), watch)))
    found = {
        "name": metric.name, "unit": metric.unit, "goal": metric.goal, "float": values[0], "codes": values[1],
        "data": "held-out" if task.choose is not None else "test",
    }  # fmt: skip
    return found, odd


def _tensors(batches: Any) -> Iterator[Tensor]:
    from paredown.quantize.batches import each, tensors_of

    for call in islice(each(batches), _FIRST_BATCHES):
        yield from tensors_of(call)
