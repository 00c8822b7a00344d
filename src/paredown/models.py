"""Models and inputs from the words of a recipe or a command line: MODEL strings, task modules, `--input`.

A user's model and task are code, and naming them runs them. Nothing is ever downloaded: library models come without
weights.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from paredown.detectors import detector_body, is_detector
from paredown.errors import MissingError, ParedownError, RejectedError, UsageError
from paredown.weights import load_into, read_weights

_KINDS = "torchvision:NAME, timm:NAME, package.module:callable or path/to/file.py:callable"
_STUBS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_LIBRARIES: list[torch.library.Library] = []
"""A declared operator lives as long as its library object."""
_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
    "float16": torch.float16,
    "half": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "long": torch.int64,
    "int32": torch.int32,
    "int": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_MOST_ELEMENTS = 10**9
_INPUT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<before>[A-Za-z]\w*):)?(?P<sizes>\d+(?:[xX×,*]\d+)*)(?::(?P<after>[A-Za-z]\w*))?"
)


# --------------------------------------------------------------------------------------------------------------- models


def load_model(
    spec: str,
    weights: str | Path | None = None,
    base_dir: str | Path | None = None,
    strip_prefix: bool | str = False,
) -> tuple[nn.Module, bool]:
    """The model that a MODEL string names, and whether weights were given. Without them a library's is random, and one's own
    has those that the callable made.

    `spec` is `torchvision:resnet50`, `timm:resnet50`, `package.module:callable` or `path/to/file.py:callable`, a path
    being relative to `base_dir` or the current folder. `weights` is a file for `read_weights`. A detector of torchvision
    comes as its body, which can be captured: backbone, feature pyramid and heads (see `detectors.detector_body`).

    Raises UsageError (no such model), RejectedError (the user's code or the weights fail) and MissingError (torchvision or
    timm is not installed).

    >>> model, given = load_model("torch.nn:Identity")
    >>> model, given
    (Identity(), False)
    """
    head, colon, name = spec.rpartition(":")
    if not colon or not head or not name:
        msg = f"MODEL must be {_KINDS}. Got {spec!r}."
        raise UsageError(msg)
    library = spec.partition(":")[0]
    if library == "torchvision":
        model = _torchvision_model(spec.partition(":")[2])
    elif library == "timm":
        model = _timm_model(spec.partition(":")[2])
    else:
        model = _own_model(head, name, spec, _folder(base_dir))
    if weights is not None:
        load_into(model, read_weights(weights), strip_prefix=strip_prefix)
        if library == "torchvision" and getattr(model, "transform_input", None) is False:
            note = (
                f"torchvision's official weights of {name} must run with transform_input=True, which weights=… sets there. Got a model "
                "without it, which computes something else from them. For these weights give MODEL as a callable that sets it."
            )
            warnings.warn(note, UserWarning, stacklevel=2)
    if library == "torchvision" and is_detector(model):
        model = detector_body(model)
    return model, weights is not None


def is_library(spec: str) -> bool:
    """Whether a MODEL string names a library's model, which is random without weights; one's own callable may load its own.

    >>> is_library("timm:resnet50"), is_library("net.py:trained")
    (True, False)
    """
    return spec.partition(":")[0] in ("torchvision", "timm")


def load_task_module(task: str, base_dir: str | Path | None = None) -> ModuleType:
    """The module of a task: a shipped one ("digits", "cifar10"), `path/to/task.py` (from `base_dir`), or `package.module`.

    Raises UsageError where there is none of that name, and RejectedError where its code fails.

    >>> load_task_module("digits").__name__
    'paredown.recipes.digits'
    """
    shipped = shipped_tasks()
    if task in shipped:
        return importlib.import_module(f"paredown.recipes.{task}")
    folder = _folder(base_dir)
    if not task.endswith(".py") and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", task):
        msg = f"task must be one of {', '.join(shipped)}, a path that ends in .py, or package.module. Got {task!r}."
        raise UsageError(msg)
    try:
        return _module(task, folder)
    except UsageError as error:
        near = difflib.get_close_matches(task, shipped, 3, 0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" Shipped tasks: {', '.join(shipped)}."
        raise UsageError(str(error) + hint) from error


def shipped_tasks() -> tuple[str, ...]:
    """Names of the tasks that come with paredown.

    >>> "digits" in shipped_tasks()
    True
    """
    import paredown.recipes

    folder = Path(str(paredown.recipes.__file__)).parent
    return tuple(sorted(p.stem for p in folder.glob("[a-z]*.py")))


def import_torchvision() -> ModuleType:
    """torchvision, also beside a torch that its wheel was not built for (CPU torch with a CUDA wheel).

    There the import fails because operators of its own library are not declared; classifiers need none of them, so they
    are declared without kernels. Detection models then fail when they call `nms`. Raises MissingError.
    """
    if "torchvision" in sys.modules and hasattr(sys.modules["torchvision"], "models"):
        return sys.modules["torchvision"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        try:
            return importlib.import_module("torchvision")
        except ModuleNotFoundError as error:
            raise _missing(error, "torchvision") from error
        except (RuntimeError, ImportError) as error:
            _forget("torchvision")
            if "torchvision::" not in str(error) and "partially initialized" not in str(error):
                raise _broken(error, "torchvision") from error
        _declare_operators()
        try:
            return importlib.import_module("torchvision")
        except (RuntimeError, ImportError) as error:
            _forget("torchvision")
            raise _broken(error, "torchvision") from error


def import_timm() -> ModuleType:
    """timm, which imports torchvision. Raises MissingError."""
    import_torchvision()
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise _missing(error, "timm") from error
    except (RuntimeError, ImportError) as error:
        _forget("timm")
        raise _broken(error, "timm") from error


def _torchvision_model(name: str) -> nn.Module:
    models = import_torchvision().models
    known = models.list_models()
    if name not in known:
        raise _unknown(name, known, "torchvision")
    options: dict[str, Any] = {"weights": None}
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in parameters:  # its default would be downloaded
        options["weights_backbone"] = None
    if name in (
        "googlenet",
        "inception_v3",
    ):  # their own truncated normal takes seconds; batch norm keeps either healthy
        options["init_weights"] = False
    return _made(lambda: models.get_model(name, **options), f"torchvision:{name}")


def _timm_model(name: str) -> nn.Module:
    timm = import_timm()
    known = timm.list_models()
    if name.partition(".")[0] not in known:  # this refuses names such as hf-hub:…, which timm would fetch
        raise _unknown(name, known, "timm")
    return _made(lambda: timm.create_model(name, pretrained=False), f"timm:{name}")


def _own_model(head: str, name: str, spec: str, folder: Path) -> nn.Module:
    module = _module(head, folder)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            near = difflib.get_close_matches(part, names, 5, 0.4) or names[:8]
            msg = f"MODEL must name a callable. Got {spec!r}, and {head} has no {part!r}. It has: {', '.join(near) or 'none'}."
            raise UsageError(msg)
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        msg = f"MODEL must name a callable that returns an nn.Module. Got a {type(found).__name__} at {spec!r}."
        raise UsageError(msg)
    _refuse_arguments(found, spec)
    with _importable(_search_folder(head, folder)):
        return _made(found, spec)


def _refuse_arguments(found: Callable[..., Any], spec: str) -> None:
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # callables from C have no signature: calling tells
        return
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.kind in plain and p.default is inspect.Parameter.empty]
    if needed:
        msg = (
            f"MODEL must name a callable that needs no arguments. Got {spec!r}, which needs {', '.join(needed)}. "
            "Write a function that gives them: def model(): return Net(...)."
        )
        raise UsageError(msg)


def _made(make: Callable[[], Any], spec: str) -> nn.Module:
    """What the callable returns, which must be an nn.Module; its own failure is told with the user's line."""
    try:
        model = _beside_torchvision(make)
    except ParedownError:
        raise
    except Exception as error:
        msg = f"the model must be built without an error. Got {type(error).__name__}: {error} at {_own_line(error)} in {spec!r}."
        raise RejectedError(msg) from error
    if not isinstance(model, nn.Module):
        msg = f"the model must be an nn.Module. Got a {type(model).__name__} from {spec!r}."
        raise UsageError(msg)
    return model


# -------------------------------------------------------------------------------------------------------------- modules


def _folder(base_dir: str | Path | None) -> Path:
    return Path(base_dir).absolute() if base_dir is not None else Path.cwd()


def _search_folder(name: str, folder: Path) -> Path:
    """Where a module's neighbours lie: beside the file, or in the base folder for a package."""
    return (folder / name).parent if name.endswith(".py") else folder


def _module(name: str, folder: Path) -> ModuleType:
    """A module by path or by dotted name, with its neighbours importable while it loads."""
    if name.endswith(".py") or "/" in name or "\\" in name:
        return _module_of_file(folder / name)
    with _importable(folder):
        try:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(name=name)
        except (ModuleNotFoundError, ValueError) as error:
            files = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
            near = difflib.get_close_matches(f"{name}.py", files, 3, 0.5) or files[:3]
            hint = f" Files in {str(folder)!r}: {', '.join(near)}." if near else ""
            msg = f"a module must be importable. Got {name!r}, and there is no {getattr(error, 'name', None) or name!r}.{hint}"
            raise UsageError(msg) from error
        try:
            module: ModuleType = _beside_torchvision(lambda: importlib.import_module(name))
            return module
        except ParedownError:
            raise
        except Exception as error:
            raise _failed(error, name) from error


class _Fresh(importlib.machinery.SourceFileLoader):
    """Reads the file as it is: bytecode from a cache may be that of an edit ago, and would be left in the user's folder."""

    def get_code(self, fullname: str) -> CodeType:
        """The code of the file."""
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _module_of_file(path: Path) -> ModuleType:
    """A Python file under a private name, which its content decides, so that the same file is one module."""
    if not path.is_file():
        folder = path.parent
        files = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, files, 3, 0.4) or files[:5]
        hint = f"Nearest there: {', '.join(near)}" if near else f"No .py file is in {str(folder)!r}"
        msg = f"a Python file must exist. Got {str(path)!r}. {hint}."
        raise UsageError(msg)
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:12]
    plain = re.sub(r"\W", "_", path.stem)
    parent = f"_paredown_{digest}"
    name = f"{parent}.{plain}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_Fresh(name, str(path)))
    if spec is None or spec.loader is None:
        msg = f"a module must be a Python file. Got {str(path)!r}."
        raise UsageError(msg)
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    # classes can be pickled and inspected only while their module and its parent are found here
    sys.modules[parent] = ModuleType(parent)
    sys.modules[parent].__path__ = [str(path.parent)]  # from .neighbour import …
    sys.modules[name] = module
    try:
        with _importable(path.parent):
            _beside_torchvision(lambda: loader.exec_module(module))
    except BaseException as error:
        for loaded in [n for n in sys.modules if n == parent or n.startswith(f"{parent}.")]:
            del sys.modules[loaded]
        if isinstance(error, ParedownError) or not isinstance(error, Exception):
            raise
        raise _failed(error, str(path)) from error
    return module


def _beside_torchvision(call: Callable[[], Any]) -> Any:
    """The user's code; where it imports a torchvision that does not fit, once more with that mended."""
    try:
        return call()
    except RuntimeError as error:
        if not re.search(r"operator torchvision::\w+ does not exist", str(error)):
            raise
    import_torchvision()
    return call()


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported inside the block; sys.path is as before afterwards."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _failed(error: Exception, where: str) -> RejectedError:
    return RejectedError(
        f"a module must import without an error. Got {type(error).__name__}: {error} at {_own_line(error)} in {where!r}."
    )


def _own_line(error: BaseException) -> str:
    """ "file.py:12 (the line)": the innermost frame in code of the user's, or of a library where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno} ({(error.text or '').strip()})"
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename != __file__ and not f.filename.startswith("<")
    ]
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(sys.base_prefix)]
    if not (own or frames):
        return "an unknown line"
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} ({frame.line})"


def _unknown(name: str, known: list[str], library: str) -> UsageError:
    near = difflib.get_close_matches(name, known, 5, 0.5)
    hint = (
        f"Nearest: {', '.join(near)}"
        if near
        else f"{len(known)} names: {library}.models.list_models()"
        if library == "torchvision"
        else "See timm.list_models()"
    )
    return UsageError(f"the model must be one of {library}'s. Got {name!r}. {hint}.")


def _missing(error: ModuleNotFoundError, library: str) -> MissingError:
    what = error.name or library
    return MissingError(
        f"{library} must be installed for such a model. Got no module {what!r}. pip install 'paredown[zoo]'."
    )


def _broken(error: Exception, library: str) -> MissingError:
    return MissingError(
        f"{library} must fit torch {torch.__version__}. Got {type(error).__name__}: {error}. Install the {library} that belongs to it: "
        "pip install 'paredown[zoo]'; `paredown doctor` explains."
    )


def _forget(library: str) -> None:
    """Take half-imported modules out, so that the next import starts afresh."""
    for name in [n for n in sys.modules if n == library or n.startswith(f"{library}.")]:
        del sys.modules[name]


def _declare_operators() -> None:
    """Declare torchvision's operators that its meta registrations ask for, without kernels; an existing one stays."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _STUBS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + schema)
    _LIBRARIES.append(library)


# --------------------------------------------------------------------------------------------------------------- inputs


def parse_input(text: str) -> Any:
    """Example inputs from words: sizes joined by x or commas, with a dtype and a name where needed.

    "1x3x224x224" is a tensor; "int64:1x16" has a dtype; "ids=int64:1x16" is a keyword argument. Several stand apart by
    spaces or semicolons and give {"args": …, "kwargs": …}. Floats are normal, integers 0 or 1, masks and bools all 1;
    all from one fixed seed. Raises UsageError.

    >>> parse_input("1x3x8x8").shape, parse_input("ids=int64:1x4")["kwargs"]["ids"].dtype
    (torch.Size([1, 3, 8, 8]), torch.int64)
    """
    parts = [p for p in re.split(r"[;\s]+|,(?=[A-Za-z_])", text.strip()) if p]
    if not parts:
        raise _bad_input(text, "nothing")
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for part in parts:
        name, tensor = _input(part, text, generator)
        if name is None:
            args.append(tensor)
        elif name in kwargs:
            raise _bad_input(text, f"the name {name!r} twice")
        else:
            kwargs[name] = tensor
    if len(args) == 1 and not kwargs:
        return args[0]
    return {"args": tuple(args), "kwargs": kwargs}


def _input(part: str, text: str, generator: torch.Generator) -> tuple[str | None, Tensor]:
    match = _INPUT.fullmatch(part)
    if match is None or (match["before"] and match["after"]):
        raise _bad_input(text, repr(part))
    word = match["before"] or match["after"] or "float32"
    dtype = _DTYPES.get(word.lower())
    if dtype is None:
        near = difflib.get_close_matches(word.lower(), _DTYPES, 1, 0.5)
        raise _bad_input(
            text, f"the dtype {word!r}" + (f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(_DTYPES)})")
        )
    if len(match["sizes"]) > 100:
        raise _bad_input(text, f"{len(match['sizes'])} characters of sizes")
    sizes = [int(s) for s in re.split(r"[xX×,*]", match["sizes"])]
    if min(sizes) < 1 or prod(sizes) > _MOST_ELEMENTS:
        raise _bad_input(text, f"{prod(sizes):,} elements in {part!r} (1 to {_MOST_ELEMENTS:,})")
    if dtype.is_floating_point:
        return match["name"], torch.randn(sizes, generator=generator).to(dtype)
    if dtype == torch.bool or "mask" in (match["name"] or ""):
        return match["name"], torch.ones(sizes, dtype=dtype)
    return match["name"], torch.randint(0, 2, sizes, generator=generator, dtype=dtype)


def _bad_input(text: str, got: str) -> UsageError:
    return UsageError(
        "an input must be sizes joined by x, with dtype and name where needed: 1x3x224x224, int64:1x16, ids=int64:1x16. "
        f"Got {got} in {text!r}."
    )
