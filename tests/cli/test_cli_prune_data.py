"""paredown prune with data: criteria that read a task or a file of inputs, the update of obs, masks that a model brings."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paredown as pare
from paredown.cli.prune import DATA_FREE, OF_GRADIENTS, OF_INPUTS
from paredown.score import TABLE

INPUT = ("--input", "4x12")
TASK = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

METRIC = {"name": "mse", "unit": "", "goal": "min"}


def net():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))


def masked():
    torch.manual_seed(3)
    model = net()
    torch_prune.l1_unstructured(model[0], "weight", 0.25)
    torch_prune.random_unstructured(model[2], "weight", 0.5)
    return model


def keeps_all():
    return torch_prune.identity(nn.Linear(12, 3), "weight")


def inputs():
    return torch.zeros(4, 12)


def data(seed, num=64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(99))
    x = torch.randn(num, 12, generator=generator) @ mixing
    return x, (x[:, :5] - x[:, 5:10]).sin()


model = net


def train_batches():
    x, y = data(1, 96)
    return [(x[i], y[i]) for i in torch.randperm(96).split(32)]


def calibration_batches():
    return [data(2)[0]]


def step(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def evaluate(predict):
    x, y = data(3)
    return {"mse": float(F.mse_loss(predict(x), y))}
"""
OWN_TRAIN = TASK.replace("def train_batches", "def _unused").replace(
    "def step", "def train(model):\n    pass\n\n\ndef _step"
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    path = folder / "own_task.py"
    path.write_text(TASK, encoding="utf-8")
    (folder / "own_train.py").write_text(OWN_TRAIN, encoding="utf-8")
    torch.manual_seed(0)
    save_file(made(path, "net").state_dict(), folder / "w.safetensors")
    np.savez(folder / "x.npz", x=made_data(path, 2).numpy())
    return path


def made(task: Path, name: str) -> nn.Module:
    model: nn.Module = runpy.run_path(str(task))[name]()
    return model


def made_data(task: Path, seed: int) -> torch.Tensor:
    x: torch.Tensor = runpy.run_path(str(task))["data"](seed)[0]
    return x


def given(task: Path) -> tuple[str, ...]:
    return (f"{task}:net", *INPUT, "--weights", str(task.with_name("w.safetensors")))


def trained(task: Path) -> nn.Module:
    model = made(task, "net")
    model.load_state_dict(load_file(task.with_name("w.safetensors")))
    return model.eval()


def zeros_of(folder: Path) -> dict[str, np.ndarray]:
    return {n: (t == 0).numpy() for n, t in load_file(folder / "model.safetensors").items() if t.ndim == 2}


def test_the_lists_are_those_of_the_table() -> None:
    assert set(OF_INPUTS) | set(OF_GRADIENTS) == {name for name, row in TABLE.items() if row.needs_data}
    assert not set(OF_INPUTS) & set(OF_GRADIENTS) and not set(DATA_FREE) & {*OF_INPUTS, *OF_GRADIENTS}


@pytest.mark.parametrize("criterion", ["taylor", "refit"])
def test_channels_by_a_task_are_those_of_the_verbs(call, task, tmp_path, criterion):
    done = call(
        "prune", *given(task), "--criterion", criterion, "--task", task, "--batches", "2", "--channels", "0.5", "--align",
        "1", "--out", "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    module = runpy.run_path(str(task))
    program = pare.capture(trained(task), torch.zeros(4, 12))
    coupling = pare.couple(program)
    torch.manual_seed(0)
    scores = pare.score(
        program, coupling, criterion, batches=module["train_batches"](), loss=module["step"], num_batches=2
    )
    expected = pare.allocate(coupling, scores, pare.examine(program), pare.Budget(channels=0.5), align=1)
    assert json.loads((tmp_path / "out/plan.json").read_text())["digest"] == done.json["plan_digest"]
    assert pare.Plan.from_json((tmp_path / "out/plan.json").read_text()).keep == expected.keep
    plain = pare.allocate(
        coupling, pare.score(program, coupling), pare.examine(program), pare.Budget(channels=0.5), align=1
    )
    assert plain.keep != expected.keep


@pytest.mark.parametrize("where", ["--calibrate", "--task"])
def test_wanda_reads_inputs_from_a_file_or_a_task(call, task, tmp_path, where):
    """By hand for the first layer: in each row the six of twelve weights of the largest |w| · ‖x‖ stay."""
    file = task.with_name("x.npz") if where == "--calibrate" else task
    done = call(
        "prune", *given(task), "--criterion", "wanda", where, file, "--granularity", "element", "--density", "0.5",
        "--out", "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    x = made_data(task, 2) if where == "--calibrate" else runpy.run_path(str(task))["data"](1, 96)[0]
    weight = trained(task).get_parameter("0.weight").detach().numpy()
    size = np.abs(weight) * np.linalg.norm(x.double().numpy(), axis=0)
    kept = size >= np.sort(size, axis=1)[:, 6:7]
    np.testing.assert_array_equal(zeros_of(tmp_path / "out")["0.weight"], ~kept)
    assert (np.abs(weight) >= np.sort(np.abs(weight), axis=1)[:, 6:7]).tolist() != kept.tolist()


@pytest.mark.parametrize("asked", [("--criterion", "obs"), ("--criterion", "l1", "--allocation", "global")])
def test_the_update_answers_for_what_leaves(call, task, tmp_path, asked):
    """Both ways: the sweep chooses (obs), or the masks of another rule are kept as they are."""
    masks = ("--granularity", "element", "--density", "0.4", *asked, "--task", str(task))
    done = call("prune", *given(task), *masks, "--update", "obs", "--out", "out", "--json")
    assert done.code == 0, done.err
    plain = call("prune", *given(task), *(masks if asked[1] == "obs" else masks[:-2]), "--out", "plain", "--json")
    assert plain.code == 0, plain.err
    new, old = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    zeros, before = zeros_of(tmp_path / "out"), zeros_of(tmp_path / "plain")
    assert {n: int(z.sum()) for n, z in zeros.items()} == {n: int(z.sum()) for n, z in before.items()}
    if asked[1] == "l1":
        assert all((zeros[n] == before[n]).all() for n in zeros)
    assert not torch.equal(new["0.weight"], old["0.weight"])
    assert done.json["fits"] and all(0 < f["after"] < f["before"] for f in done.json["fits"].values())
    x, errors, dense = made_data(task, 5), [], trained(task)  # inputs that nothing has read
    for state in (new, old):
        module = trained(task)
        module.load_state_dict(state)
        with torch.no_grad():
            errors.append(float((module(x) - dense(x)).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_own_masks_are_updated_too_and_people_are_told(call, task, tmp_path):
    kept = np.random.default_rng(0).random((32, 12)) > 0.5
    np.savez(tmp_path / "m.npz", **{"0.weight": kept})
    done = call(
        "prune",
        *given(task),
        "--masks",
        "m.npz",
        "--update",
        "obs",
        "--calibrate",
        task.with_name("x.npz"),
        "--out",
        "out",
    )
    assert done.code == 0, done.err
    assert "update: error of a layer's outputs" in done.out
    np.testing.assert_array_equal(zeros_of(tmp_path / "out")["0.weight"], ~kept)


def test_a_task_that_trains_by_itself_gives_its_calibration_inputs(call, task, tmp_path):
    own = task.with_name("own_train.py")
    masks = ("--granularity", "2:4", "--criterion", "obs", "--update", "obs", "--task", own)
    done = call("prune", *given(task), *masks, "--out", "out", "--json")
    assert done.code == 0, done.err
    groups = ~zeros_of(tmp_path / "out")["2.weight"].reshape(16, 8, 4)
    assert (groups.sum(-1) == 2).all()
    done = call("prune", *given(task), "--criterion", "taylor", "--macs", "0.5", "--task", own, "--out", "taylor")
    assert done.code == 2 and "its own train alone" in done.err


def test_masks_of_torch_are_taken_over(call, task, tmp_path):
    brought = {n: (m == 0).numpy() for n, m in made(task, "masked").state_dict().items() if n.endswith("weight_mask")}
    assert len(brought) == 2
    done = call("prune", f"{task}:masked", *INPUT, "--masks", "model", "--out", "out", "--json")
    assert done.code == 0, done.err
    zeros = zeros_of(tmp_path / "out")
    assert set(zeros) == {"0.weight", "2.weight", "4.weight"}  # no second tensor
    for name, gone in brought.items():
        np.testing.assert_array_equal(zeros[name.removesuffix("_mask")], gone)
    assert done.json["simulated"]["zeros"] == sum(int(g.sum()) for g in brought.values())


@pytest.mark.parametrize("criterion", ["l1", "random"])
def test_more_is_pruned_on_top_of_masks_of_torch(call, task, tmp_path, criterion):
    """What was taken over stays zero, also under a criterion that does not see zeros."""
    brought = made(task, "masked").state_dict()
    asked = ("--granularity", "element", "--density", "0.3", "--criterion", criterion)
    done = call("prune", f"{task}:masked", *INPUT, *asked, "--out", "out", "--json")
    assert done.code == 0, done.err
    assert any("took over the masks of torch.nn.utils.prune" in n and "352 zeros" in n for n in done.json["notes"])
    zeros = zeros_of(tmp_path / "out")
    for name in ("0.weight", "2.weight"):
        assert zeros[name][(brought[f"{name}_mask"] == 0).numpy()].all()
    assert int(zeros["2.weight"].sum()) >= round(0.7 * 512)
    loaded = pare.load(tmp_path / "out", made(task, "net"), torch.zeros(4, 12))
    np.testing.assert_array_equal((loaded.get_parameter("2.weight") == 0).numpy(), zeros["2.weight"])


REFUSED: list[tuple[tuple[str, ...], int, str]] = [
    (("--macs", "0.5", "--criterion", "taylor"), 2, "must be given data: --task"),
    (("--macs", "0.5", "--criterion", "taylor", "--calibrate", "X"), 2, "must be given --task, whose step is the loss"),
    (("--macs", "0.5", "--criterion", "refit"), 2, "or --calibrate FILE.npz"),
    (("--macs", "0.5", "--task", "T"), 2, "must come with a criterion that reads data"),
    (("--macs", "0.5", "--criterion", "movement"), 2, "learnt in training"),
    (("--macs", "0.5", "--criterion", "obs", "--task", "T", "--calibrate", "X"), 2, "without --calibrate"),
    (("--macs", "0.5", "--criterion", "obs", "--calibrate", "X", "--data", "D"), 2, "must come with --task"),
    (("--macs", "0.5", "--criterion", "obs", "--calibrate", "X", "--batches", "0"), 2, "integer ≥ 1"),
    (("--macs", "0.5", "--criterion", "obs", "--task", "digitss"), 2, "Did you mean digits"),
    (("--macs", "0.5", "--update", "obs", "--task", "T"), 2, "must be used with masks"),
    (("--density", "0.5", "--granularity", "element", "--update", "obs"), 2, "--update obs must be given data"),
    (("--drop", "0", "--task", "T"), 2, "Got --drop, which reads none"),
    (("--masks", "model"), 2, "must be given a MODEL with masks"),
    (("--masks", "model", "--pruned", "P"), 2, "without --"),
]


@pytest.mark.parametrize(("asked", "code", "says"), REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(call, task, tmp_path, asked, code, says):
    words = {"T": str(task), "X": str(task.with_name("x.npz"))}
    done = call("prune", *given(task), *[words.get(a, a) for a in asked], "--out", "out")
    assert (done.code, says in " ".join(done.err.split())) == (code, True), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_random_model_is_refused_by_criteria_that_read_data(call, task, tmp_path):
    np.save("pictures.npy", np.zeros((2, 3, 64, 64), dtype=np.float32))
    asked = ("--channels", "0.5", "--criterion", "wanda", "--calibrate", "pictures.npy", "--dry-run")
    done = call("prune", "torchvision:squeezenet1_1", "--input", "2x3x64x64", *asked)
    assert done.code == 3 and "needs trained weights" in done.err and "Pass --weights" in done.err


def test_ones_own_callable_may_load_its_own_weights(call, task, tmp_path):
    """Only the callable knows whether they are trained, and the command says so."""
    asked: tuple[Any, ...] = ("--macs", "0.5", "--criterion", "taylor", "--task", task, "--out", "out", "--json")
    done = call("prune", f"{task}:net", *INPUT, *asked)
    assert done.code == 0
    assert done.json["weights"] == "callable"
    assert any("those that the callable made" in note for note in done.json["notes"])


def test_masks_that_keep_all_are_refused(call, task, tmp_path):
    done = call("prune", f"{task}:keeps_all", *INPUT, "--masks", "model", "--out", "out")
    assert done.code == 2 and "masks that keep all" in done.err
