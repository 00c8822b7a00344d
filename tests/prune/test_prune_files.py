"""Folders that `save` wrote: read as a stranger's, and taken up again as a result that goes on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import forked
import paredown as pare
from paredown.errors import RejectedError, ResourceError
from paredown.program import Program
from paredown.prune import Pruned
from paredown.weights import read_weights


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1)
    )


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def masked(program: Program, granularity: str, **budget: float) -> Pruned:
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, granularity=granularity)
    given = pare.Budget(**budget) if budget else None
    align = {} if "density" in budget or ":" in granularity else {"align": 1}
    return pare.prune(program, pare.allocate(coupling, scores, pare.examine(program), given, **align))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    pare.save(masked(pare.capture(net(), X), "channel", channels=0.5), path)
    return path


def _text(text: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(text)


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(data)


def _field(**fields: object) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("form.json", _text('{"schema": 1, "re'), "must be JSON"),
        ("form.json", _text("[" * 100_000), "must be JSON"),
        ("form.json", _text("[]"), "JSON object"),
        ("form.json", _text('{"schema": 1}'), "must hold the realiser"),
        ("form.json", _bytes(b"\xff\xfe\x00"), "UTF-8"),
        ("form.json", _field(realiser="evil"), "must hold the realiser"),
        ("form.json", _field(attributes={"0": {"forward": "evil"}}), "attributes that are sizes"),
        ("form.json", _field(attributes={"0": {"weight": 3}}), "none called 'weight' at 0"),
        ("form.json", _field(attributes={"0": {"_parameters": 3}}), "none called '_parameters'"),
        ("form.json", _field(attributes={"0": {"training": 3}}), "none called 'training'"),
        ("form.json", _field(attributes={"9": {"groups": 3}}), "no module '9'"),
        ("form.json", _field(stages=[{"plan": 3}]), "must hold stages"),
        ("form.json", _field(stages=[{"plan": {}, "realiser": "graph", "attributes": {}}]), "as it was written"),
        ("form.json", _field(inputs=3), "inputs' shapes"),
        ("form.json", _field(notes=3), "notes that are texts"),
        ("form.json", _field(fits={"0.weight": {"before": "x", "after": 1.0}}), "fits of a number"),
        ("form.json", _field(plan_digest="0" * 64), "must belong together"),
        ("plan.json", _text('{"schema": 1, "ke'), "as it was written"),
        ("plan.json", _bytes(b"\xff\xfe\x00"), "UTF-8"),
        ("model.safetensors", _truncated, "header"),
        ("model.safetensors", _bytes((2**63).to_bytes(8, "little") + b"{}"), "header"),
        ("model.safetensors", _bytes(b""), "0 bytes"),
        ("model.safetensors", lambda file: save_file({"a": torch.ones(2)}, file), "must fit Sequential"),
    ],
)
def test_damaged_and_hostile_folders_are_refused_in_words(
    folder: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], says: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path / name)
    with pytest.raises(RejectedError) as caught:
        pare.load(tmp_path, net())
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "dtype"), [([10**6, 10**6], "float32"), ([2, 3, 12, 12], "load"), ([-1], "float32"), ("x", "float32")]
)
def test_described_inputs_allocate_no_more_than_an_example(
    folder: Path, tmp_path: Path, shape: object, dtype: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _field(realiser="graph", inputs={"args": [{"shape": shape, "dtype": dtype}], "kwargs": {}})(tmp_path / "form.json")
    with pytest.raises(RejectedError, match="shapes of at most"):
        pare.load(tmp_path, net())


def test_the_plan_of_another_model_is_refused(folder: Path) -> None:
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 12, 3))
    with pytest.raises(RejectedError, match="Pass the class the model was pruned from"):
        pare.load(folder, narrow)


STEPS = {
    "masks then channels": (("element", {"density": 0.3}), ("channel", {"channels": 0.5})),
    "channels then 2:4": (("channel", {"channels": 0.5}), ("2:4", {})),
    "channels twice": (("channel", {"channels": 0.75}), ("channel", {"channels": 0.5})),
    "masks twice": (("4x1", {"density": 0.5}), ("element", {"density": 0.3})),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_folder_is_taken_up_and_pruned_again(case: str, tmp_path: Path) -> None:
    """The result of the second level lies in one folder, which loads onto the dense class."""
    (one, first), (two, second) = STEPS[case]
    pare.save(masked(pare.capture(net(), X), one, **first), tmp_path / "one")
    again = pare.load_pruned(tmp_path / "one", pare.capture(nn.Sequential(*net().children()), X))
    level = masked(pare.capture(again.module, X), two, **second)
    both = pare.compose(again, level)
    pare.save(both, tmp_path / "two")
    loaded = pare.load(tmp_path / "two", net())
    assert torch.equal(loaded(X), level.module(X))
    if again.plan.masks:  # zeros of the first level are zeros of the result, and still known as such
        assert set(both.plan.masks) >= {n for n, m in again.plan.masks.items() if not _cut_away(m, level, n)}
        assert both.proof.num_zeros > 0
    third = pare.load_pruned(tmp_path / "two", pare.capture(net(), X))
    assert (third.plan, third.proof, third.realiser) == (both.plan, both.proof, both.realiser)
    artifact = pare.export(third, tmp_path / "model.onnx")
    assert pare.check(artifact, third, [X]).max_error <= 1e-5


def _cut_away(mask: pare.Mask, level: Pruned, name: str) -> bool:
    kept = mask.kept
    for axis, indices in level.plan.keep.get(name, {}).items():
        kept = kept.take(indices, axis=axis)
    return bool(kept.all())


def test_masks_of_a_folder_hold_in_a_training_that_goes_on(tmp_path: Path) -> None:
    pare.save(masked(pare.capture(net(), X), "element", density=0.3), tmp_path)
    again = pare.load_pruned(tmp_path, pare.capture(net(), X))
    zeros = {n: ~torch.from_numpy(m.kept) for n, m in again.plan.masks.items()}

    def step(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 1).square().mean()

    tuned = pare.recover(again, lambda: [X, X], step=step, epochs=2, optimizer="adamw", batch_norm_batches=0)
    for name, gone in zeros.items():
        weight = tuned.module.get_parameter(name)
        assert not weight[gone].any()
        assert not torch.equal(weight, again.module.get_parameter(name))


def test_notes_and_fits_come_back(tmp_path: Path) -> None:
    program = pare.capture(net(), X)
    fitted = pare.reconstruct(masked(program, "channel", channels=0.5), [X])
    simulated = dataclasses.replace(masked(program, "element", density=0.3), notes=("what a reader should know",))
    assert fitted.fits
    for number, pruned in enumerate((fitted, simulated)):
        pare.save(pruned, tmp_path / str(number))
        again = pare.load_pruned(tmp_path / str(number), program)
        assert (again.fits, again.notes) == (dict(pruned.fits), pruned.notes)
    form = tmp_path / "1" / "form.json"  # as it was written before
    form.write_text(json.dumps({k: v for k, v in json.loads(form.read_text()).items() if k not in ("notes", "fits")}))
    assert pare.load_pruned(form.parent, program).notes == ()


@pytest.mark.slow
def test_levels_over_three_processes(tmp_path: Path) -> None:
    """Each level only knows the folder that the one before it wrote, and the class."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n    torch.manual_seed(0)\n    return nn.Sequential("
        "nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1))\n"
    )
    code = (
        "import sys, torch; import paredown as pare; from net import net\n"
        "x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))\n"
        "before, after = sys.argv[1:]\n"
        "program = pare.capture(net(), x)\n"
        "first = None if before == '-' else pare.load_pruned(before, program)\n"
        "here = program if first is None else pare.capture(first.module, x)\n"
        "coupling = pare.couple(here)\n"
        "plan = pare.allocate(coupling, pare.score(here, coupling), pare.examine(here), pare.Budget(channels=0.75), align=1)\n"
        "level = pare.prune(here, plan)\n"
        "pare.save(level if first is None else pare.compose(first, level), after)\n"
        "print(float(level.module(x).double().sum()))\n"
    )
    said = ""
    for before, after in (("-", "a"), ("a", "b"), ("b", "c")):
        done = forked.run(code, before, after, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    sys.path.insert(0, str(tmp_path))
    try:
        from net import net as fresh  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    loaded = pare.load(tmp_path / "c", fresh())
    assert tuple(loaded[0].weight.shape) == (7, 3, 3, 3)  # 16 → 12 → 9 → 7
    assert float(loaded(X).detach().double().sum()) == float(said)


def _reparametrized(how: str) -> nn.Module:
    """A class whose layers compute their weights; capture folds them, and so must load."""
    from torch.nn.utils import parametrizations, spectral_norm, weight_norm

    wraps = {
        "old weight_norm": weight_norm,
        "weight_norm": parametrizations.weight_norm,
        "old spectral_norm": spectral_norm,
        "spectral_norm": parametrizations.spectral_norm,
    }
    torch.manual_seed(0)
    wrap = wraps[how]
    return nn.Sequential(wrap(nn.Linear(6, 16)), nn.ReLU(), wrap(nn.Linear(16, 12)), nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("what", ["channels", "masks", "ranks"])
@pytest.mark.parametrize("how", ["old weight_norm", "weight_norm", "old spectral_norm", "spectral_norm"])
def test_a_class_that_computes_its_weights_is_loaded_as_it_was_captured(how: str, what: str, tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    program = pare.capture(_reparametrized(how), x)
    if what == "ranks":
        small = pare.factorize(program, pare.choose_ranks(program, pare.Budget(parameters=0.7), align=1))
    elif what == "channels":
        small = masked(program, "channel", channels=0.5)
    else:
        small = masked(program, "element", density=0.5)
    pare.save(small, tmp_path)
    own = _reparametrized(how)
    before = {n: t.clone() for n, t in own.state_dict().items()}
    loaded = pare.load(tmp_path, own)
    with torch.no_grad():
        assert torch.allclose(loaded(x), small.module.eval()(x), atol=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in own.state_dict().items())
    assert before.keys() == own.state_dict().keys()


# ------------------------------------------------------------------------------------------- what an interruption leaves


@contextlib.contextmanager
def most_bytes_per_file(limit: int) -> Iterator[None]:
    """As a disk that is full: what is written beyond the limit fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def wide_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 4))


def test_a_disk_that_is_full_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    x = torch.randn(2, 64)
    program = pare.capture(wide_net(), x)
    first, second = (masked(program, g, **b) for g, b in (("2:4", {}), ("element", {"density": 0.3})))
    pare.save(first, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with most_bytes_per_file(2**20), pytest.raises(ResourceError, match=r"model\.safetensors must be writable"):
        pare.save(second, tmp_path)
    assert before.items() <= {file.name: file.read_bytes() for file in tmp_path.iterdir()}.items()
    assert torch.equal(pare.load(tmp_path, wide_net())(x), first.module(x))
    pare.save(second, tmp_path)
    assert torch.equal(pare.load(tmp_path, wide_net())(x), second.module(x))
    assert len(list(tmp_path.glob("masks-*.safetensors"))) == 1


def test_weights_of_another_plan_are_refused(folder: Path, tmp_path: Path) -> None:
    program = pare.capture(net(), X)
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, "random", seed=5)
    other = pare.prune(
        program, pare.allocate(coupling, scores, pare.examine(program), pare.Budget(channels=0.5), align=1)
    )
    pare.save(other, tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(weights)  # of the same shapes
    with pytest.raises(RejectedError, match=r"model\.safetensors and form\.json .* must belong together"):
        pare.load(tmp_path, net())
    save_file(dict(read_weights(folder / "model.safetensors")), tmp_path / "model.safetensors")  # as it was before
    assert isinstance(pare.load(tmp_path, net()), nn.Sequential)


# ------------------------------------------------------------------------------------------------- inputs and dtypes


class Branching(nn.Module):
    """Another function for another value of what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(6, 8)
        self.two = nn.Linear(8, 3)

    def forward(self, x: Tensor, parts: Any = (), doubled: bool = False, mode: str | None = None) -> Tensor:
        x = torch.relu(self.one(x))
        if isinstance(parts, list):
            x = x + len(parts)
        x = self.two(x * 2 if doubled else x)
        return x.sigmoid() if mode == "sigmoid" else x


INPUTS: list[Any] = [
    (torch.ones(2, 6), (), True),
    (torch.ones(2, 6), [1.5, None, (1, 2)], False, "sigmoid"),
    {"args": (torch.ones(2, 6),), "kwargs": {"mode": "sigmoid", "parts": {"list": [], "1": 2}, "doubled": True}},
]


@pytest.mark.parametrize("inputs", INPUTS, ids=["flag", "list and text", "keywords"])
def test_inputs_that_are_no_tensors_choose_the_same_branch(inputs: Any, tmp_path: Path) -> None:
    small = thinned(Branching(), inputs, realiser="graph")
    pare.save(small, tmp_path)
    loaded = pare.load(tmp_path, Branching())
    args, kwargs = small.program.inputs
    assert torch.equal(loaded(*args, **kwargs), small.module(*args, **kwargs))


def thinned(model: nn.Module, inputs: Any, **options: Any) -> Pruned:
    program = pare.capture(model, inputs)
    coupling = pare.couple(program)
    scores = pare.score(program, coupling)
    plan = pare.allocate(coupling, scores, pare.examine(program), pare.Budget(channels=0.5), align=1)
    return pare.prune(program, plan, **options)


class Pair(NamedTuple):
    x: Tensor
    scale: float


class OfPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, pair: Pair) -> Tensor:
        return self.net(pair.x) * pair.scale  # type: ignore[no-any-return]


def test_inputs_that_a_file_cannot_hold_must_be_given_again(tmp_path: Path) -> None:
    pair = Pair(torch.ones(2, 6), 3.0)
    small = thinned(OfPair(), (pair,), realiser="graph")
    pare.save(small, tmp_path)
    with pytest.raises(RejectedError, match=r"Got a Pair.*inputs="):
        pare.load(tmp_path, OfPair())
    assert torch.equal(pare.load(tmp_path, OfPair(), (pair,))(pair), small.module(pair))
    pare.save(thinned(OfPair(), (pair,)), tmp_path / "class")
    assert isinstance(pare.load(tmp_path / "class", OfPair()), OfPair)  # needs none


@pytest.mark.parametrize("realiser", ["module", "graph"])
@pytest.mark.parametrize(
    ("saved", "given", "advice"),
    [
        (torch.float32, torch.float16, "float32"),
        (torch.float64, torch.float32, "float64"),
        (torch.bfloat16, torch.float32, "bfloat16"),
    ],
)
def test_weights_are_not_cast_in_silence(
    saved: torch.dtype, given: torch.dtype, advice: str, realiser: str, tmp_path: Path
) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    x = torch.ones(2, 6, dtype=saved)
    small = thinned(made().to(saved), x, realiser=realiser)
    pare.save(small, tmp_path)
    with pytest.raises(RejectedError, match=rf"Got 0\.weight of {advice}.*\.to\(torch\.{advice}\)"):
        pare.load(tmp_path, made().to(given))
    assert torch.equal(pare.load(tmp_path, made().to(saved))(x), small.module(x))


def test_factors_are_not_cast_in_silence(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False)).double()
    program = pare.capture(wide, torch.ones(2, 16, dtype=torch.float64))
    pare.save(pare.factorize(program, pare.choose_ranks(program, pare.Budget(parameters=0.5), align=1)), tmp_path)
    with pytest.raises(RejectedError, match=r"Got 0\.0\.weight of float64"):
        pare.load(tmp_path, copy.deepcopy(wide).float())
