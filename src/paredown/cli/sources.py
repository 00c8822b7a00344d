"""MODEL on the command line: loaded, with weights where given, and captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.errors import ParedownError, RejectedError, ResourceError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from paredown.plan import Plan
    from paredown.program import Program
    from paredown.prune import Pruned
    from paredown.recipe import Recipe
    from paredown.train import Task

RANDOM = "No weights were given: the model is random. Sizes and counts hold, its values mean nothing."
OWN = "No weights were given: they are those that the callable made, random if it loaded none."


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A captured model and where it came from."""

    name: str
    program: Program
    weights: str
    """ "given", "callable" (one's own, which may have loaded them) or "random" (a library's model)."""
    masks: Plan | None = None
    """Of torch.nn.utils.prune, where MODEL came with some and they were asked for."""
    told: tuple[str, ...] = ()
    """What else was done to it before the command began."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person must know: where weights came from first, then what the capture changed."""
        notes = {"random": RANDOM, "callable": OWN}
        return (*((notes[self.weights],) if self.weights in notes else ()), *self.program.notes, *self.told)


def loaded(
    model: str,
    input: str,
    *,
    weights: Path | None = None,
    strip_prefix: str | None = None,
    pruned: Path | None = None,
    train: bool = True,
    threads: int | None = None,
    device: str | None = None,
    seed: int = 0,
    take_masks: bool = False,
) -> Loaded:
    """The model of a command, captured on the CPU with a dynamic batch. Random weights come from the seed.

    With `take_masks` the masks of torch.nn.utils.prune that it comes with are not only folded, but handed on.
    """
    refuse_device(device)
    use_threads(threads)
    from paredown.models import is_library, load_model, parse_input
    from paredown.program import capture
    from paredown.train.task import seed_all

    inputs = parse_input(input)
    seed_all(seed)
    refuse_both(pruned, weights)
    network, given = load_model(model, weights=weights, strip_prefix=strip_prefix or False)
    if pruned is not None:
        from paredown.prune import load

        network, given = load(existing_folder(pruned, "--pruned"), network, inputs), True
    masks = None
    if take_masks:
        network, masks = _with_masks(network)
    program = capture(network, inputs, train=train)
    return Loaded(
        name=model,
        program=program,
        weights="given" if given else "random" if is_library(model) else "callable",
        masks=masks,
    )


def _with_masks(network: nn.Module) -> tuple[nn.Module, Plan | None]:
    """The model without reparametrization and its masks; as it is where it has none that prune anything."""
    from paredown.prune import take_over
    from paredown.prune.given import torch_masks

    if all(kept.all() for kept in torch_masks(network).values()):
        return network, None
    return take_over(network)


def taken_over(found: Loaded, *, train: bool = True) -> tuple[Loaded, Pruned]:
    """The masks that MODEL came with, carried out and proven: the next level starts from them."""
    import dataclasses

    from paredown.program import capture
    from paredown.prune import prune

    assert found.masks is not None  # the caller looked
    before = prune(found.program, found.masks)
    zeros = sum(m.kept.size - m.num_kept for m in found.masks.masks.values())
    told = f"took over the masks of torch.nn.utils.prune that MODEL came with: {zeros:,} zeros in {len(found.masks.masks)} weights"
    program = capture(before.module, found.program.inputs, train=train)
    return dataclasses.replace(found, program=program, masks=None, told=(told, *before.notes)), before


def continued(found: Loaded, folder: Path, *, train: bool = True) -> tuple[Loaded, Pruned]:
    """What an earlier command wrote, and the same as a captured model: the next level starts from it."""
    import dataclasses

    from paredown.program import capture
    from paredown.prune import load_pruned

    before = load_pruned(existing_folder(folder, "--pruned"), found.program)
    program = capture(before.module, found.program.inputs, train=train)
    return dataclasses.replace(found, program=program, weights="given"), before


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What is quantized: with its masks, where it has some, so that none of their zeros is lost unseen."""

    found: Loaded
    thing: Program | Pruned
    batches: Callable[[], Iterable[Any]] | None = None
    """The inputs that a run's task calibrates on; None where MODEL was named."""
    task: Task | None = None
    """Of a run."""
    dense: nn.Module | None = None
    """What a run pruned, with its trained weights; None where MODEL was named, or they are not known."""
    seed: int = 0
    """Of a run's recipe."""


def tuned(
    model: str,
    input: str | None,
    *,
    weights: Path | None = None,
    strip_prefix: str | None = None,
    pruned: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> Tuned:
    """MODEL, what an earlier command made of it, or the folder of a run (see `is_run`)."""
    if input is None:
        refuse_device(device)
        use_threads(threads)
        return _of_run(Path(model))
    refuse_both(pruned, weights)
    found = loaded(
        model, input, weights=weights, strip_prefix=strip_prefix, train=False, threads=threads, device=device,
        take_masks=pruned is None,
    )  # fmt: skip
    thing: Program | Pruned = found.program
    if pruned is not None:
        found, thing = continued(found, pruned, train=False)
    elif found.masks is not None:
        found, thing = taken_over(found, train=False)
    return Tuned(found=found, thing=thing)


def is_run(model: str, input: str | None, others: dict[str, Any]) -> bool:
    """Whether MODEL is a folder, whose recipe says the rest: `others` are options that say it too, and must be left out."""
    if not Path(model).is_dir():
        if input is None:
            msg = f"MODEL must come with --input, an example of what it takes, as 1x3x224x224. Got {model!r} alone."
            raise UsageError(msg)
        return False
    _recipe_file(Path(model))
    for option, value in {"--input": input, **others}.items():
        if value is not None:
            msg = f"{option} must be left out for the folder of a run, whose recipe says it. Got {str(value)!r} for {model!r}."
            raise UsageError(msg)
    return True


def _of_run(folder: Path) -> Tuned:
    """The pruned model of a run, and its calibration inputs: recipe.yaml names the task that makes the dense one."""
    from paredown.pipeline.compress import task_of
    from paredown.program import capture
    from paredown.recipe import load_recipe
    from paredown.train.task import seed_all

    recipe = load_recipe(_recipe_file(folder))
    if recipe.given:
        msg = f"{_RUN} Got {str(folder)!r} of a notebook, whose functions no file holds. Name the model: paredown quantize MODEL --input … --pruned {folder}."
        raise UsageError(msg)
    task, make, given = task_of(recipe)
    seed_all(recipe.seed)
    made = make()
    trained = _trained_by_run(folder, recipe, task, made, given=given)
    dense = Loaded(name=str(folder), program=capture(made, task.inputs(), train=False), weights="given")
    found, before = continued(dense, folder, train=False)
    return Tuned(
        found=found, thing=before, batches=calibration_of(task, recipe.seed), task=task, dense=made if trained else None,
        seed=recipe.seed,
    )  # fmt: skip


def _trained_by_run(folder: Path, recipe: Recipe, task: Task, made: nn.Module, *, given: bool) -> bool:
    """Whether the dense model has trained weights: those that it came with, or those that the run trained, which it then gets."""
    from paredown.pipeline.stages import BASE, trains_base

    if not trains_base(recipe, task):
        return given
    file = folder / "steps" / BASE
    if not file.is_file():
        return False
    from safetensors.torch import load_file

    state = load_file(file)
    if {n: t.shape for n, t in made.state_dict().items()} != {n: t.shape for n, t in state.items()}:
        return False
    made.load_state_dict(state, strict=True)
    made.eval()
    return True


def calibration_of(task: Task, seed: int, most: int | None = None) -> Callable[[], Iterable[Any]]:
    """A task's calibration inputs, the same at each call: the file is compared on what it was calibrated on.

    No batch more than it takes for `most` samples is read: a loader may have no end.
    """

    def batches() -> Iterable[Any]:
        from paredown.train.task import batch_length, seed_all

        seed_all(seed)
        seen = 0
        for batch in task.calibration_batches():
            yield batch
            seen += batch_length(batch)
            if most is not None and seen >= most:
                return

    return batches


_RUN = "a folder to quantize must be one that `paredown compress` wrote, with recipe.yaml and form.json."


def _recipe_file(folder: Path) -> Path:
    """The recipe in a run's folder. Raises UsageError where it, or a pruned model beside it, is not there."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        msg = f"{_RUN} Got {str(folder)!r} without {recipe.name}. Name the model that was pruned: paredown quantize MODEL --input … --pruned {folder}."
        raise UsageError(msg)
    if not (folder / "form.json").is_file():
        msg = f"{_RUN} Got {str(folder)!r} without form.json: the run pruned nothing, or has not ended. Name the model: paredown quantize MODEL --input … --weights FILE."
        raise UsageError(msg)
    return recipe


def refuse_both(pruned: Path | None, weights: Path | None) -> None:
    """A folder of a pruned model brings its weights."""
    if pruned is not None and weights is not None:
        msg = f"--pruned must stand without --weights: the folder holds the weights. Got {str(weights)!r} too."
        raise UsageError(msg)


def use_threads(threads: int | None) -> None:
    """Set the threads of PyTorch."""
    if threads is None:
        return
    if threads < 1:
        msg = f"--threads must be an integer ≥ 1. Got {threads}."
        raise UsageError(msg)
    import torch

    torch.set_num_threads(threads)


def refuse_device(device: str | None) -> None:
    """Only compress trains; the others work on the graph, on the CPU."""
    if device not in (None, "cpu"):
        msg = f"--device must be cpu for this command, which trains nothing. Got {device!r}. `paredown compress` trains on other devices."
        raise UsageError(msg)


def existing_folder(path: Path, option: str) -> Path:
    """A folder that is there."""
    if not path.is_dir():
        msg = (
            f"{option} must be a folder. Got {str(path)!r}, which {'is a file' if path.exists() else 'does not exist'}."
        )
        raise UsageError(msg)
    return path


def number(text: str | None) -> Any:
    """A number as it was meant: "0.5" a fraction, "1000000" an integer; other texts are left to the rule that refuses them.

    >>> number("0.5"), number("64"), number("1e-1"), number("25%")
    (0.5, 64, 0.1, '25%')
    """
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def arrays(path: Path, option: str) -> dict[str, Any]:
    """Arrays of a .npz or .npy file by name, samples along the first axis. Nothing is unpickled, nor unpacked that would not fit in memory."""
    import numpy as np

    if not path.is_file():
        msg = f"{option} must be a .npz or .npy file. Got {str(path)!r}, which {'is a folder' if path.is_dir() else 'does not exist'}."
        raise RejectedError(msg)
    try:
        _refuse_large(path, option)
        found = np.load(path, allow_pickle=False)
        read = {"0": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except ParedownError:
        raise
    except Exception as error:  # a broken file is refused by zipfile, zlib, tokenize or NumPy, each in its own way
        msg = f"{option} must be a whole .npz or .npy file, readable without pickle. Got {type(error).__name__} at {str(path)!r}: {error}. Write plain arrays with numpy.savez."
        raise RejectedError(msg) from error
    if not read or any(a.ndim == 0 or len(a) == 0 for a in read.values()):
        msg = f"{option} must hold at least one array with at least one sample. Got { ({n: a.shape for n, a in read.items()}) } at {str(path)!r}."
        raise RejectedError(msg)
    lengths = {n: len(a) for n, a in read.items()}
    if len(set(lengths.values())) > 1:
        msg = f"{option} must hold as many samples of every input. Got {lengths} at {str(path)!r}."
        raise RejectedError(msg)
    return read


MOST_ARRAYS = 1000
"""More than any network has inputs; an archive of more is none of samples."""


def _refuse_large(path: Path, option: str) -> None:
    """Before anything is unpacked: what a file says that it holds. Raises RejectedError and ResourceError."""
    import zipfile

    from paredown.machine_memory import available_bytes

    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if len(entries) > MOST_ARRAYS:
            msg = f"{option} must hold at most {MOST_ARRAYS:,} arrays, one for each input. Got {len(entries):,} at {str(path)!r}."
            raise RejectedError(msg)
        size = sum(e.file_size for e in entries)
    free = available_bytes()
    if free is not None and 2 * size > free:  # the file's arrays, and their copies as tensors
        msg = (
            f"{option} must fit in memory twice, as read and as tensors. Got {size:,} bytes of arrays in a file of {path.stat().st_size:,} "
            f"at {str(path)!r}, with {free:,} bytes free. Save fewer samples."
        )
        raise ResourceError(msg)
