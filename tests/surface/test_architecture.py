"""The rooms and the one way through them, sizes, names and forbidden calls: read from the source, nothing is run."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "paredown"

TIERS = (
    "errors",
    "budget plan granularity target recipe recipe_fields records strict_yaml environments contents",
    "plain placed machine_memory traced layouts bootstrap",
    "program weights weights_process",
    "couple examine statistics",
    "score",
    "allocate",
    "train",
    "recipes",  # task modules: data and a training step of their own
    "detectors",  # what of torchvision's detectors can be captured
    "models",  # finds models and task modules by name, the shipped ones too
    "prune factorize quantize",
    "export",
    "measure",
    "search curve controls chord ranking",
    "sweep",
    "report",
    "compare",
    "pipeline coverage",
    "doctor",
    "cli",
    "__main__",
)
"""A room imports rooms above it, and rooms of its own line where that makes no circle."""
RANK = {room: rank for rank, line in enumerate(TIERS) for room in line.split()}
WITHOUT_TORCH = "errors budget plan granularity target recipe recipe_fields records strict_yaml environments contents curve controls chord bootstrap ranking sweep report doctor machine_memory".split()
REPORT_MAY_IMPORT = {"errors", "records", "curve", "controls", "ranking", "report"}
DEFERRED = set(
    "torchao onnx onnxruntime onnxscript onnx_ir openvino executorch litert_torch ai_edge_quantizer ai_edge_litert flatbuffers matplotlib jinja2 sklearn torchvision timm optuna ray tensorboard mlflow transformers".split()
)
"""Imported inside functions only: they are extras, and slow."""

MAX_FUNCTION_LINES = 80
P95_FUNCTION_LINES = 40
MAX_MODULE_LINES = 600
FORBIDDEN = re.compile(r"manager|handler|factory|builder|helpers?|utils?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    path: Path
    tree: ast.Module
    num_lines: int

    @property
    def name(self) -> str:
        """couple/space.py"""
        return self.path.relative_to(SOURCE).as_posix()

    @property
    def module(self) -> str:
        """paredown.couple.space; a package is called by its folder."""
        parts = self.path.relative_to(SOURCE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """couple; the front door itself is ""."""
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else ""


@functools.cache
def sources() -> tuple[Source, ...]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Source(path=path, tree=ast.parse(text), num_lines=text.count("\n")))
    assert len(found) > 40  # an empty list would pass every test below
    return tuple(found)


@functools.cache
def nodes(source: Source) -> tuple[ast.AST, ...]:
    """All of a file."""
    return tuple(ast.walk(source.tree))


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those of functions or of TYPE_CHECKING."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from at_import(statement.orelse)
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(statement, field, []))
        for branch in getattr(statement, "handlers", []):
            yield from at_import(branch.body)


def imported(source: Source, some: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import among some nodes; `from a import b` gives a.b."""
    for node in some:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}:{node.lineno}: imports must be absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def rooms_used(source: Source) -> Iterator[tuple[str, int]]:
    """(room, line) of everything of paredown that a file mentions as a module: also deferred, for types, and in texts."""
    for name, line in imported(source, nodes(source)):
        if name.split(".")[0] == "paredown":
            yield [*name.split("."), ""][1], line
    for node in nodes(source):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"paredown(\.\w+)+", node.value)
        ):
            yield node.value.split(".")[1], node.lineno


def functions() -> Iterator[tuple[Source, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for source in sources():
        for node in nodes(source):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield source, node


def classes() -> Iterator[tuple[Source, ast.ClassDef]]:
    for source in sources():
        yield from ((source, node) for node in nodes(source) if isinstance(node, ast.ClassDef))


# ----------------------------------------------------------------------------------------------------- import direction


def test_every_room_has_its_place() -> None:
    rooms = {source.room for source in sources()} - {""}
    assert rooms <= set(RANK), f"give {rooms - set(RANK)} a place in TIERS"


def test_imports_go_one_way() -> None:
    wrong, seen = [], 0
    for source in sources():
        for room, line in rooms_used(source):
            if source.room in ("", room):
                continue
            seen += 1
            if room not in RANK and source.room == "cli":
                continue  # the command line may use the front door as users do
            if room not in RANK:
                wrong.append(f"{source.name}:{line}: uses the front door ({room!r}); import from the room")
            elif RANK[room] > RANK[source.room]:
                wrong.append(f"{source.name}:{line}: {source.room} must not import {room}")
    assert seen > 50
    assert not wrong, "\n".join(wrong)


def test_report_reads_records_only() -> None:
    used = {
        (room, source.name, line)
        for source in sources()
        if source.room == "report"
        for room, line in rooms_used(source)
    }
    assert {u for u in used if u[0] not in REPORT_MAY_IMPORT} == set()


def test_rooms_make_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for source in sources():
        edges.setdefault(source.room, set()).update(
            room for room, _ in rooms_used(source) if source.room not in ("", room)
        )
    assert circle(edges) is None


def test_modules_make_no_circle_at_import() -> None:
    modules = {source.module for source in sources()}
    edges: dict[str, set[str]] = {}
    for source in sources():
        named = edges.setdefault(source.module, set())
        for name, _ in imported(source, at_import(source.tree.body)):
            target = name if name in modules else name.rpartition(".")[0]
            # A package may import its own files: that is what its __init__ is for.
            if target in modules and target != source.module and not target.startswith(f"{source.module}."):
                named.add(target)
    assert sum(map(len, edges.values())) > 50
    assert circle(edges) is None


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """One circle of the graph, or None."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str] | None:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return None
        for other in sorted(edges.get(node, ())):
            if found := walk(other, [*way, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(edges) if (found := walk(node, []))), None)


def test_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_extras_are_imported_inside_functions() -> None:
    """Or at the top of a file that is itself imported inside functions only: one that subclasses what an extra brings."""
    needs = {
        source.module: f"{source.name}:{line}: {name}"
        for source in sources()
        for name, line in imported(source, at_import(source.tree.body))
        if name.split(".")[0] in DEFERRED
    }
    early = []
    for source in sources():
        for name, line in imported(source, at_import(source.tree.body)):
            target = next((n for n in (name, name.rpartition(".")[0]) if n in needs), None)
            if target and source.module not in needs:
                early.append(f"{source.name}:{line} imports {target} at its top, which needs {needs[target]}")
    packages = [text for text in needs.values() if "__init__.py" in text]
    assert not early + packages, "\n".join(early + packages)


def test_rooms_import_without_any_extra() -> None:
    rooms = sorted({f"paredown.{source.room}" for source in sources()} - {"paredown.", "paredown.__main__"})
    assert len(rooms) > 15
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {DEFERRED!r}:
            raise ModuleNotFoundError(f"no module named {{name}}", name=name)
sys.meta_path.insert(0, Absent())
for room in {rooms!r}:
    importlib.import_module(room)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_light_rooms_never_mention_torch() -> None:
    heavy = [
        f"{source.name}:{line}: {name}"
        for source in sources()
        if source.room in WITHOUT_TORCH
        for name, line in imported(source, nodes(source))
        if name.split(".")[0] == "torch"
    ]
    assert not heavy, "\n".join(heavy)


def test_light_rooms_load_no_torch() -> None:
    modules = [
        source.module
        for source in sources()
        if source.room in WITHOUT_TORCH and not source.name.endswith("__main__.py")
    ]
    assert len(modules) > 5
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(sorted({DEFERRED | {'torch'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------- sizes and names


def test_functions_fit_a_screen() -> None:
    lengths = sorted(
        (node.end_lineno - node.lineno + 1, f"{source.name}:{node.lineno} {node.name}")
        for source, node in functions()
        if node.end_lineno
    )
    too_long = [f"{n} lines: {where}" for n, where in lengths if n > MAX_FUNCTION_LINES]
    assert not too_long, "\n".join(too_long)
    assert lengths[int(0.95 * len(lengths))][0] <= P95_FUNCTION_LINES


def test_modules_are_short() -> None:
    too_long = [
        f"{source.num_lines} lines: {source.name}" for source in sources() if source.num_lines > MAX_MODULE_LINES
    ]
    assert not too_long, "\n".join(too_long)


def test_inheritance_is_flat() -> None:
    parents = {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
        for source, node in classes()
        if source.room != "errors"
    }

    def depth(name: str) -> int:
        return (
            1 + max((depth(parent) for parent in parents.get(name, ()) if parent != name), default=0)
            if name in parents
            else 0
        )

    assert max(map(depth, parents)) >= 1
    assert {name: depth(name) for name in parents if depth(name) > 2} == {}


def test_names_say_what_a_thing_is() -> None:
    named = [(f"{source.name}:{node.lineno}", node.name) for source, node in [*classes(), *functions()]]
    named += [
        (source.name, part) for source in sources() for part in source.path.relative_to(SOURCE).with_suffix("").parts
    ]
    bad = [f"{where}: {name}" for where, name in named if any(FORBIDDEN.fullmatch(part) for part in words(name))]
    bad += [f"{where}: {name}" for where, name in named if re.match(r"_?(Base|Abstract)[A-Z]", name)]
    assert not bad, "\n".join(bad)


def words(name: str) -> list[str]:
    """snake_case and CamelCase, by word."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)


def test_words() -> None:
    assert words("_TrialManager_x2") == ["Trial", "Manager", "x", "2"]
    assert words("fail_handler") == ["fail", "handler"]


def test_everything_public_has_a_docstring() -> None:
    bare = [source.name for source in sources() if not (ast.get_docstring(source.tree) or "").strip(". ")]
    for source in sources():
        bare += [
            f"{source.name}:{node.lineno} {name}"
            for name, node in public(source.tree, "")
            if not ast.get_docstring(node)
        ]
    assert not bare, "\n".join(bare)


def public(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Functions, classes and methods whose names have no leading underscore; overloads are not asked twice."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            if any("overload" in ast.unparse(d) or ".setter" in ast.unparse(d) for d in child.decorator_list):
                continue
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


# --------------------------------------------------------------------------------------------------------------- safety

UNSAFE_KEYWORDS = {("weights_only", False), ("allow_pickle", True), ("shell", True), ("trust_remote_code", True)}
UNSAFE_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *("torch.jit.load", "torch.export.load", "torch.hub.load", "marshal.loads", "tempfile.mktemp"),
}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "requests", "httpx", "socket"}
UNSAFE_NAMES = {"urllib.request", "http.client", "http.server", "torch.hub"}


def unsafe(tree: ast.AST, source: str) -> list[str]:
    """Calls and imports that run data as code, start a shell, or speak to a network."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {
                (k.arg, k.value.value)
                for k in node.keywords
                if isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
            }
            bad = [f"{k}={v}" for k, v in given & UNSAFE_KEYWORDS]
            if name in UNSAFE_CALLS or name.endswith(".extractall"):
                bad.append(name)
            if name == "torch.load" and ("weights_only", True) not in given:
                bad.append("torch.load without weights_only=True")
            found += [f"{source}:{node.lineno}: {text}" for text in bad]
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        found += [f"{source}: import {n}" for n in names if n.split(".")[0] in UNSAFE_MODULES or n in UNSAFE_NAMES]
    return found


PIPED = {"export/processes/executorch_process.py", "export/processes/litert_process.py"}
"""These run as children of ours and read a program from the pipe alone, as `export.phone` wrote it: never a file."""


def test_nothing_runs_data_as_code_or_calls_out() -> None:
    found = [text for source in sources() for text in unsafe(source.tree, source.name)]
    piped = [t for t in found if t.endswith(": torch.export.load") and t.partition(":")[0] in PIPED]
    assert len(piped) == len(PIPED)
    assert all("torch.export.load(io.BytesIO(arrays[0]" in (SOURCE / name).read_text() for name in PIPED)
    found = [t for t in found if t not in piped]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=False)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
        "import pickle",
        "from urllib import request",
    ],
)
def test_unsafe_lines_are_found(line: str) -> None:
    assert unsafe(ast.parse(line), "x.py")


def test_safe_lines_are_not_found() -> None:
    assert not unsafe(
        ast.parse("model.eval(); torch.load(p, weights_only=True); yaml.safe_load(t); from urllib.parse import quote"),
        "x.py",
    )


def test_no_path_of_a_machine_in_the_tree() -> None:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    places = [
        re.escape(f"{Path.home()}/"),
        re.escape(f"{ROOT}/"),
        r"/(?:home|Users)/(?!user/|you/|me/)\w+/",
        r"[A-Z]:\\+Users\\",
    ]
    if not ROOT.parent.is_relative_to(tempfile.gettempdir()) and len(ROOT.parent.parts) > 1:
        places.append(re.escape(f"{ROOT.parent}/"))
    pattern = re.compile("|".join(places))
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    assert len(files) > 40
    found = []
    for path in files:
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)
