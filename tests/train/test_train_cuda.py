"""Training on a GPU: every way to prune in training, resuming, distillation, rounding, sensitivities and whole recipes.

What comes back lives on the CPU and is exported and proven there; the GPU is only as near to the CPU as its sums are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paredown as pare
from paredown.prune.schedule import Gradual
from paredown.search import sensitivity
from paredown.train import fit, predictor, recover, reestimate_batch_norm
from paredown.train.loop import Hook
from sparse_task import BATCHES, WAYS, batches, interrupted, program, small_net, sparse, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed: torch.cuda.is_available() is False"),
]


def on_cpu(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    return bool(tensors) and all(t.device.type == "cpu" for t in tensors)


def apart(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two networks' tensors, relative to the largest entry of each."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).abs().max() / (y.double().abs().max() + 1e-9)) for x, y in pairs)


@pytest.mark.parametrize("distil", ["none", "kl", "mse"])
def test_training_on_a_gpu_is_that_on_the_cpu(distil: Any) -> None:
    options: dict[str, Any] = {
        "epochs": 2,
        "lr": 0.01,
        "teacher": None if distil == "none" else small_net(1),
        "distil": distil,
    }
    places: set[str] = set()
    seen = Hook(name="where", after_step=lambda t: places.update(p.device.type for p in t.module.parameters()))
    fixed = [(x + 0.0, y) for x, y in batches()]
    there = fit(small_net(), fixed, step, device="cuda", hooks=[seen], **options)
    here = fit(small_net(), fixed, step, **options)
    assert places == {"cuda"} and on_cpu(there.module)
    assert apart(there.module, here.module) < 1e-2
    assert there.history[-1].loss == pytest.approx(here.history[-1].loss, rel=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_prune_in_training(way: str) -> None:
    there, here = sparse(**WAYS[way], device="cuda"), sparse(**WAYS[way])
    assert on_cpu(there.module)
    assert {n: m.kept.mean() for n, m in there.plan.masks.items()}.keys() == here.plan.masks.keys()
    for name, mask in there.plan.masks.items():
        values = there.module.get_parameter(name).detach().numpy()
        assert not values[~mask.kept].any(), name
    kept = [sum(int(m.kept.sum()) for m in pruned.plan.masks.values()) for pruned in (there, here)]
    assert kept[0] == pytest.approx(kept[1], rel=0.1)  # soft movement's own count differs a little


def test_channels_leave_while_a_gpu_trains() -> None:
    options: dict[str, Any] = {"granularity": "channel", "density": None, "align": 1, "epochs": 2}
    for budget in (pare.Budget(channels=0.5), [pare.Budget(channels=0.7), pare.Budget(channels=0.7)]):
        small = sparse(**options, budget=budget, device="cuda", teacher=small_net(1), distil="mse", distil_layers=["8"])
        assert on_cpu(small.module)
        assert sum(p.numel() for p in small.module.parameters()) < 0.6 * sum(
            p.numel() for p in small_net().parameters()
        )


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    path, options = tmp_path / "train.safetensors", {"schedule": Gradual(updates=6), "device": "cuda"}
    with pytest.raises(pare.errors.Interrupted):
        sparse(**options, checkpoint=path, train_batches=interrupted(2 * BATCHES + 3))
    resumed, whole = sparse(**options, checkpoint=path), sparse(**options)
    assert on_cpu(resumed.module) and apart(resumed.module, whole.module) < 0.05
    a, b = (np.concatenate([m.kept.ravel() for m in p.plan.masks.values()]) for p in (resumed, whole))
    assert (a == b).mean() > 0.97


def test_masks_hold_with_momentum_and_batch_norm_is_measured_there() -> None:
    coupling = pare.couple(program())
    scores = pare.score(program(), coupling, "l1", granularity="element")
    plan = pare.allocate(coupling, scores, pare.examine(program()), pare.Budget(density=0.3))
    small = recover(
        pare.prune(program(), plan), batches, step=step, epochs=2, lr=0.05, device="cuda", batch_norm_batches=4
    )
    assert on_cpu(small.module)
    for name, mask in plan.masks.items():
        assert not small.module.get_parameter(name).detach().numpy()[~mask.kept].any()
    fixed = [(x + 0.0, y) for x, y in batches()]
    new = [reestimate_batch_norm(small.module, fixed, fixed[0][0], step=step, device=d) for d in ("cpu", "cuda")]
    assert on_cpu(new[1]) and apart(new[1], new[0]) < 1e-3


def test_sensitivity_is_that_of_the_cpu() -> None:
    coupling = pare.couple(program())
    scores = pare.score(program(), coupling, "l1")
    held = [x for x, _ in batches()]
    for repair in (False, True):
        options: dict[str, Any] = {"batches": held, "distance": "kl", "amounts": [0.25, 0.5], "repair": repair}
        here, there = (sensitivity(program(), coupling, scores, device=d, **options) for d in ("cpu", "cuda"))
        assert here.increase and here.increase.keys() == there.increase.keys()
        for name, by_kept in here.increase.items():
            for kept, worse in by_kept.items():
                assert worse is not None and there.increase[name][kept] == pytest.approx(worse, rel=0.02, abs=1e-4)


def test_rounding_is_trained_there(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("onnxruntime")
    from paredown.export import check, export
    from paredown.quantize.qat import train_quantized

    held = [x for x, _ in batches()]
    for scheme in ("int8", "w4a8"):
        trained = train_quantized(
            program(),
            batches,
            step=step,
            calibrate=held,
            scheme=scheme,
            epochs=2,
            lr=0.01,
            teacher=small_net(),
            device="cuda",
        )
        assert on_cpu(trained.module)
        if scheme == "int8":
            assert check(export(trained, tmp_path / "net.onnx"), trained, [held[0]]).holds


RECIPES: dict[str, dict[str, Any]] = {
    "levels": {"levels": [{"channels": 0.75}, {"channels": 0.667}]},
    "taylor": {"criterion": "taylor", "levels": [{"channels": 0.5}]},
    "refit": {"criterion": "refit", "reconstruct": True, "levels": [{"channels": 0.5}]},
    "knapsack": {"allocation": "knapsack", "levels": [{"macs": 0.5}]},
    "elements": {"granularity": "element", "align": None, "schedule": "gradual", "levels": [{"density": 0.3}]},
    "gates": {"criterion": "gates", "levels": [{"channels": 0.5}]},
    "growing": {"regularize": "growing", "levels": [{"channels": 0.5}]},
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from paredown.pipeline import compress
    from paredown.recipe import parse_recipe

    task = Path(__file__).parents[1] / "pipeline" / "small_task.py"
    recipe = parse_recipe(
        {
            "schema": 1, "name": "small", "task": str(task), "threads": 1, "device": "cuda", "prune": {"align": 4, **RECIPES[name]},
            "recover": {"epochs": 2, "lr": 0.02, "batch_norm_batches": 4, "distil": "mse"}, "measure": {"runs": 5, "seconds": 0.2},
        }
    )  # fmt: skip
    compress(recipe, out=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "report.html").exists()


def test_trials_share_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from paredown.pipeline.curves import curve
    from paredown.recipe import parse_recipe

    recipe = parse_recipe(
        {
            "schema": 1, "name": "moons", "task": str(Path(__file__).parents[1] / "pipeline" / "curve_task.py"), "device": "cuda",
            "prune": {"align": 4}, "recover": {"epochs": 2, "lr": 0.02}, "curve": {"amounts": [0.5], "seeds": [0], "limit": 5.0},
        }
    )  # fmt: skip
    found = curve(recipe, out=tmp_path / "run", quiet=True, processes=4)
    assert not found.document["failed"]
    accuracy = [r.measured["metric"].value for r in found.records if "metric" in r.measured]
    assert len(accuracy) > 3 and max(accuracy) > 80


class Tables(nn.Module):
    """Makes tensors where its input lies: torch.export builds the device of the capture into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(x.shape[-1], device=x.device) + torch.zeros(1, device=x.device).to(x.device)
        return self.head((self.norm(self.inner(x)).relu() * ramp).mean((2, 3)))


@pytest.mark.parametrize("realiser", ["module", "graph"])
def test_devices_that_export_built_in(realiser: Any) -> None:
    torch.manual_seed(0)
    tables = pare.capture(Tables(), torch.zeros(2, 3, 8, 8))
    coupling = pare.couple(tables)
    plan = pare.allocate(
        coupling, pare.score(tables, coupling), pare.examine(tables), pare.Budget(channels=0.5), align=1
    )
    small = recover(
        pare.prune(tables, plan, realiser=realiser), batches, step=step, epochs=1, device="cuda", batch_norm_batches=4
    )
    x = next(iter(batches()))[0]
    assert on_cpu(small.module) and small.module(x).device.type == "cpu"
    there = small.module.to("cuda")(x.to("cuda")).cpu()
    assert torch.allclose(there, small.module.to("cpu")(x), atol=1e-2)


def test_answers_of_a_module_on_a_gpu_come_back() -> None:
    module, x = small_net().eval(), next(iter(batches()))[0]
    assert torch.allclose(predictor(module.to("cuda"))(x.to("cuda")).cpu(), predictor(module.to("cpu"))(x), atol=1e-3)
