"""Every way of pruning that a recipe can name: what leaves, by how much, and what is told of it."""

import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import paredown as pare
from paredown.errors import Interrupted, NothingToDo, UsageError
from paredown.pipeline.folder import RunFolder
from paredown.pipeline.levels import check_teacher, one_level, started, without_random_teacher
from paredown.pipeline.run import Run
from paredown.pipeline.ways import IN_TRAINING, Here, Way, check_ways
from paredown.prune import obs
from paredown.prune.accumulate import READINGS
from paredown.prune.movement import LEARNT
from paredown.prune.schedule import OneShot
from paredown.prune.sparsify import _Asked
from paredown.recipe import Recipe, parse_recipe
from paredown.recipe_fields import Level
from paredown.score import TABLE
from paredown.train import Task


def recipe_of(**prune: Any) -> Recipe:
    recover = {"epochs": 1, "lr": 0.02, "batch_norm_batches": 2}
    return parse_recipe({"schema": 1, "task": "small", "prune": {"align": 1, **prune}, "recover": recover})


def run_of(task: Task, recipe: Recipe, out: Path, *, given: bool = True) -> Run:
    folder = RunFolder(path=out)
    folder.steps.mkdir(exist_ok=True, parents=True)
    return Run(
        recipe=recipe, task=task, folder=folder, say=lambda _: None, on_training=lambda *_: None, weights_given=given,
        model=task.model, environment={"versions": {}},
    )  # fmt: skip


def levels(task: Task, recipe: Recipe, out: Path) -> tuple[pare.Pruned, list[dict[str, Any]]]:
    """All levels of a recipe, on the task's untrained model."""
    check_ways(recipe, task)
    run = run_of(task, recipe, out)
    start = started(run, task.model())
    tuned, told = start.before, []
    for number, level in enumerate(recipe.prune.levels, start=1):
        done = one_level(run, number, level, start.program, tuned, start.dense)
        if done is not None:
            tuned, details = done
            told.append(json.loads(json.dumps(details)))  # a record must hold it
    assert tuned is not None
    return tuned, told


def zeros(module: nn.Module) -> tuple[int, int]:
    weights = [p for p in module.parameters() if p.dim() >= 2]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


MASKS: dict[str, dict[str, Any]] = {
    "at once by chance, which does not see what is gone": {"criterion": "random"},
    "gradual": {"schedule": "gradual", "allocation": "global"},
    "lottery": {"schedule": "lottery", "schedule_options": {"rounds": 1, "rewind": "learning_rate"}},
    "movement": {"schedule": "gradual", "criterion": "movement", "criterion_options": {"score_lr": 0.1}},
    "greedy": {"allocation": "greedy", "score_batches": 1},
}


LONG = ("lottery", "movement")


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.slow) if w in LONG else w for w in MASKS])
def test_each_density_is_of_what_the_level_before_left(way: str, task: Task, tmp_path: Path) -> None:
    """0.5 and then 0.4 of the rest: 0.2 of all weights of layers, in every way."""
    recipe = recipe_of(granularity="element", levels=[{"density": 0.5}, {"density": 0.4}], **MASKS[way])
    tuned, told = levels(task, recipe, tmp_path)
    gone, total = zeros(tuned.module)
    assert total == 4816  # 9·16 + 2·9·16·16 + 4·16 weights of layers
    assert total - gone == pytest.approx(0.2 * total, abs=2)
    assert [round(t["simulated"]["nonzero_parameters"] - 100, -2) for t in told] == [2400, 1000]
    assert told[1]["simulated"]["macs"] == 304_192 > told[1]["simulated"]["effective_macs"]
    assert told[1]["simulated"]["effective_badge"] == "estimated"


def test_a_moving_mask_keeps_its_density(task: Task, tmp_path: Path) -> None:
    recipe = recipe_of(
        granularity="element", schedule="rigl", criterion="random", allocation="erk", schedule_options={"every": 2},
        levels=[{"density": 0.3}],
    )  # fmt: skip
    tuned, _ = levels(task, recipe, tmp_path)
    gone, total = zeros(tuned.module)
    assert total - gone == pytest.approx(0.3 * total, abs=2)
    assert tuned.plan.masks["b.weight"].density < 0.3  # ERK gives the small layers more
    assert "head.weight" not in tuned.plan.masks or tuned.plan.masks["head.weight"].density > 0.3


def test_two_of_four_needs_no_amount(task: Task, tmp_path: Path) -> None:
    tuned, _ = levels(task, recipe_of(granularity="2:4", levels=[{}]), tmp_path)
    weight = tuned.module.get_parameter("b.weight").detach()
    per_group = (weight != 0).view(16, 4, 4, 3, 3).sum(2)  # along the input channels
    assert int(per_group.max()) == int(per_group.min()) == 2


def without_training(recipe: Recipe) -> Recipe:
    """The same without recovery: what a level itself makes."""
    recover = recipe.recover.model_copy(update={"epochs": 0, "batch_norm_batches": 0, "distil": "none"})
    return recipe.model_copy(update={"recover": recover})


def moved(tuned: pare.Pruned, task: Task) -> float:
    """How far the outputs are from the dense ones, on images that nothing has read."""
    dense, images = task.model().eval(), torch.cat([x for x, _ in task.test_batches()])  # type: ignore[misc]
    with torch.no_grad():
        return float((tuned.module.eval()(images) - dense(images)).square().mean())


def test_the_sweep_of_obs_is_that_of_the_verb(task: Task, tmp_path: Path) -> None:
    """With criterion obs a level is prune.obs: at once, before any training, as many of each layer as were asked."""
    plain = recipe_of(granularity="element", criterion="obs", score_batches=4, levels=[{"density": 0.4}])
    options = {"update": "obs", "update_options": {"block": 32, "damping": 0.05}}
    updated = plain.model_copy(update={"prune": plain.prune.model_copy(update=options)})
    masked, _ = levels(task, without_training(plain), tmp_path / "plain")
    tuned, told = levels(task, without_training(updated), tmp_path / "updated")
    assert zeros(tuned.module) == zeros(masked.module) == (86 + 2 * 1382 + 38, 4816)  # 60 % of every layer
    assert moved(tuned, task) < 0.5 * moved(masked, task)
    assert all(fit["after"] < fit["before"] for fit in told[0]["fits"].values()) and len(told[0]["fits"]) == 4
    assert told[0]["reached"]["update"] == {"verb": "obs", "block": 32, "damping": 0.05}
    program = pare.capture(task.model(), task.inputs())
    assert task.train_batches is not None
    torch.manual_seed(0)
    batches = task.train_batches()
    density = {n: m.density for n, m in tuned.plan.masks.items()}
    direct = obs(program, lambda: batches, step=task.step, density=density, block=32, damping=0.05, num_batches=4)
    for name, tensor in direct.module.state_dict().items():
        assert torch.equal(tensor, tuned.module.state_dict()[name]), name


def test_wanda_in_turn_masks_the_layers_before_as_the_level_will(task: Task, tmp_path: Path) -> None:
    """Its one option is sequential: the density is that of the level."""
    given: dict[str, Any] = {"criterion": "wanda", "score_batches": 2, "granularity": "element"}
    recipe = recipe_of(**given, criterion_options={"sequential": True}, levels=[{"density": 0.4}])
    tuned, _ = levels(task, without_training(recipe), tmp_path)
    program = pare.capture(task.model(), task.inputs())
    coupling, cost = pare.couple(program), pare.examine(program)
    plans = []
    for options in ({"sequential": True, "density": 0.4}, {}):
        assert task.train_batches is not None
        torch.manual_seed(0)
        batches = task.train_batches()
        scores = pare.score(program, coupling, "wanda", granularity="element", batches=batches, loss=task.step, num_batches=2, **options)  # fmt: skip
        plans.append(pare.allocate(coupling, scores, cost, pare.Budget(density=0.4)))
    masks = {n: m.digest for n, m in tuned.plan.masks.items()}
    assert masks == {n: m.digest for n, m in plans[0].masks.items()} != {n: m.digest for n, m in plans[1].masks.items()}


def test_masks_of_any_rule_are_answered_and_earlier_zeros_stay(task: Task, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "granularity": "4x1", "allocation": "global", "score_batches": 4,
        "levels": [{"density": 0.6}, {"density": 0.5, "granularity": "element"}],
    }  # fmt: skip
    tuned, told = levels(task, without_training(recipe_of(update="obs", **given)), tmp_path / "updated")
    first, _ = levels(task, without_training(recipe_of(**{**given, "levels": given["levels"][:1]})), tmp_path / "first")
    masked, _ = levels(task, without_training(recipe_of(**given)), tmp_path / "plain")
    for name, mask in first.plan.masks.items():
        assert not (tuned.module.get_parameter(name).detach().numpy()[~mask.kept]).any(), name
    assert moved(tuned, task) < 0.7 * moved(masked, task)
    assert all(t["fits"] for t in told)
    gone, total = zeros(tuned.module)
    assert total - gone == pytest.approx(0.3 * total, abs=8)


@pytest.mark.parametrize("regularize", ["growing", "slimming"])
def test_channels_leave_after_a_penalty(regularize: str, task: Task, tmp_path: Path) -> None:
    recipe = recipe_of(regularize=regularize, criterion="bn_scale", levels=[{"channels": 0.5}])
    tuned, told = levels(task, recipe, tmp_path)
    assert tuned.module.get_parameter("b.weight").shape == (8, 8, 3, 3)
    assert told[0]["removed"][0]["after"] == told[0]["removed"][0]["before"] // 2
    assert "regularize" in told[0]["reached"]
    plain, _ = levels(task, recipe_of(criterion="bn_scale", levels=[{"channels": 0.5}]), tmp_path / "plain")
    assert not torch.equal(plain.module.get_parameter("b.weight"), tuned.module.get_parameter("b.weight"))


def test_gates_choose_channels(task: Task, tmp_path: Path) -> None:
    tuned, _ = levels(
        task,
        recipe_of(criterion="gates", criterion_options={"epochs": 1}, levels=[{"macs": 0.5}]),
        tmp_path / "steps",
    )
    assert pare.examine(pare.capture(tuned.module, task.inputs())).macs <= 0.51 * 304_192


def test_measured_losses_decide_and_are_kept(task: Task, tmp_path: Path) -> None:
    recipe = recipe_of(allocation="knapsack", score_batches=1, levels=[{"macs": 0.5}])
    tuned, told = levels(task, recipe, tmp_path)
    assert told[0]["reached"]["allocation"] == "knapsack"
    lines = (tmp_path / "steps" / "level-1-sensitivity.jsonl").read_text().splitlines()
    again, _ = levels(task, recipe, tmp_path)
    assert (tmp_path / "steps" / "level-1-sensitivity.jsonl").read_text().splitlines() == lines
    assert again.plan.digest == tuned.plan.digest


def test_low_rank_between_removals(task: Task, tmp_path: Path) -> None:
    """Channels, then chains by the data-whitened SVD, then a mask on the chains: the folder rebuilds it."""
    given: list[dict[str, Any]] = [
        {"channels": 0.75},
        {"parameters": 0.7, "factorize": "svd_llm"},
        {"density": 0.5, "granularity": "element"},
    ]
    tuned, told = levels(task, recipe_of(levels=given), tmp_path)
    assert all(r["method"] == "svd_llm" for r in told[1]["ranks"].values()) and told[1]["ranks"]
    assert told[1]["reached"]["reached"]["parameters"] <= 0.7 * told[0]["reached"]["reached"]["parameters"]
    gone, total = zeros(tuned.module)
    assert total - gone == pytest.approx(total / 2, abs=1)
    assert {type(m).__name__ for m in (tuned.module.b, tuned.module.c)} == {"Sequential"}  # type: ignore[union-attr]
    pare.save(tuned, tmp_path / "saved")
    x = task.inputs()
    with torch.no_grad():
        loaded = pare.load(tmp_path / "saved", task.model()).eval()(x)
        assert torch.equal(loaded, tuned.module.eval()(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual() for _ in range(3)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x).relu()


def test_blocks_leave_by_their_influence(task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Blocks()
    with torch.no_grad():
        net.blocks[1].conv.weight.mul_(0.01)  # hardly changes what it gets
        net.blocks[1].conv.bias.zero_()
    deep = dataclasses.replace(task, model=lambda: net)
    tuned, told = levels(deep, recipe_of(granularity="layer", levels=[{"modules": 2}]), tmp_path)
    assert told[0]["left_out"] == ["blocks.1"]
    counted = pare.examine(pare.capture(tuned.module, task.inputs()))
    reached = told[0]["reached"]["reached"]
    assert (counted.parameters, counted.macs) == (reached["parameters"], reached["macs"])
    with pytest.raises(NothingToDo, match="residual blocks"):
        levels(task, recipe_of(granularity="layer", levels=[{"modules": 1}]), tmp_path)


def test_a_training_that_prunes_goes_on_where_it_was_stopped(task: Task, tmp_path: Path) -> None:
    recipe = recipe_of(granularity="element", schedule="gradual", levels=[{"density": 0.3}])
    recipe = recipe.model_copy(update={"recover": recipe.recover.model_copy(update={"epochs": 3})})
    whole, _ = levels(task, recipe, tmp_path / "whole")
    calls = 0

    def stopping(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:  # in the third epoch of eight batches
            raise KeyboardInterrupt
        assert task.step is not None
        return task.step(model, batch)

    with pytest.raises(Interrupted):
        levels(dataclasses.replace(task, step=stopping), recipe, tmp_path / "cut")
    calls = 1000
    again, _ = levels(dataclasses.replace(task, step=stopping), recipe, tmp_path / "cut")
    assert calls - 1000 < 24  # not from the beginning: 8 steps of the last epoch, and batch norm
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name
    assert again.plan.digest == whole.plan.digest


def masked_by_torch(task: Task) -> Task:
    """The task with a model of which torch.nn.utils.prune holds half of a kernel, and some of a bias, at zero."""

    def model() -> nn.Module:
        net = task.model()
        torch_prune.l1_unstructured(net.b, "weight", 0.5)  # type: ignore[arg-type]
        torch_prune.l1_unstructured(net.head, "bias", 2)  # type: ignore[arg-type]
        return net

    return dataclasses.replace(task, model=model)


BESIDE: dict[str, dict[str, Any]] = {
    "channels": {"levels": [{"channels": 0.5}]},
    "channels, fitted": {"levels": [{"channels": 0.5}], "reconstruct": True, "score_batches": 2},
    "channels after a penalty": {"levels": [{"channels": 0.5}], "regularize": "growing"},
    "gates": {"levels": [{"macs": 0.6}], "criterion": "gates", "criterion_options": {"epochs": 1}},
    "masks": {"levels": [{"density": 0.5}], "granularity": "element"},
    "masks in a training": {"levels": [{"density": 0.5}], "granularity": "element", "schedule": "gradual"},
    "masks of others": {
        "levels": [{"density": 0.5}],
        "granularity": "element",
        "schedule": "gradual",
        "exclude": ["b"],
    },
}


@pytest.mark.parametrize("way", BESIDE)
def test_masks_that_a_model_came_with_stay_in_every_training(way: str, task: Task, tmp_path: Path) -> None:
    masked = masked_by_torch(task)
    tuned, _ = levels(masked, recipe_of(**BESIDE[way]), tmp_path)
    for name, least in (("b.weight", 0.4), ("head.bias", 0.5)):
        weight, mask = tuned.module.get_parameter(name).detach().numpy(), tuned.plan.masks[name]
        assert 1 - mask.density >= least and not weight[~mask.kept].any(), name
    assert float(tuned.module.get_parameter("a.weight").detach().abs().sum()) > 0


def test_one_shot_in_rounds_is_that_of_the_library(task: Task, tmp_path: Path) -> None:
    """SynFlow must see its own mask: in one round, ranked across layers, it leaves a whole layer without weights."""
    given: dict[str, Any] = {
        "granularity": "element",
        "criterion": "synflow",
        "levels": [{"density": 0.01}],
        "floor": 0.0,
    }
    recipe = without_training(recipe_of(schedule_options={"rounds": 20}, **given))
    tuned, told = levels(task, recipe, tmp_path / "rounds")
    at_once, _ = levels(task, without_training(recipe_of(allocation="global", **given)), tmp_path / "once")
    program = pare.capture(task.model(), task.inputs())
    assert task.step is not None and task.train_batches is not None
    library = pare.sparsify(
        program, task.train_batches, step=task.step, density=0.01, criterion="synflow", schedule=OneShot(rounds=20),
        floor=0.0, epochs=0, batch_norm_batches=0,
    )  # fmt: skip
    assert {n: m.bits for n, m in tuned.plan.masks.items()} == {n: m.bits for n, m in library.plan.masks.items()}
    assert {n: m.bits for n, m in tuned.plan.masks.items()} != {n: m.bits for n, m in at_once.plan.masks.items()}
    assert told[0]["reached"]["schedule"] == "OneShot(rounds=20)" and told[0]["reached"]["allocation"] == "global"


def test_rounds_come_after_what_earlier_levels_left(task: Task, tmp_path: Path) -> None:
    two = recipe_of(granularity="element", schedule_options={"rounds": 3}, levels=[{"density": 0.5}, {"density": 0.4}])
    tuned, _ = levels(task, without_training(two), tmp_path)
    gone, total = zeros(tuned.module)
    assert total - gone == pytest.approx(0.2 * total, abs=2)


CHOICES = [
    ({"granularity": g, "criterion": c, "schedule": s}, {"density": 0.5} if g != "2:4" else {})
    for g in ("element", "4x1", "2:4") for c in (*TABLE, *LEARNT, *READINGS) for s in ("one-shot", "gradual", "iterative")
    if c != "soft_movement"
]  # fmt: skip


def test_no_allocation_is_what_the_library_takes(task: Task) -> None:
    """In a training that of sparsify; at once, and for units, that of allocate, which is uniform for all."""
    assert set(IN_TRAINING) == {*LEARNT, *READINGS, "gates"}
    for prune, amount in CHOICES:
        recipe = recipe_of(levels=[amount], **prune)
        way = Way(recipe=recipe, task=task, level=recipe.prune.levels[0], number=1, weights_given=True)
        library = _Asked.read(prune["granularity"], prune["criterion"], prune["schedule"], None).usual()
        assert recipe.prune.allocation is None
        assert way.allocation == (library if way.in_training else "uniform"), prune
    assert recipe_of(levels=[{"channels": 0.5}]).prune.usual_allocation(Level(channels=0.5)) == "uniform"


def test_a_training_without_an_allocation_ranks_as_the_library_does(task: Task, tmp_path: Path) -> None:
    given: dict[str, Any] = {"granularity": "element", "schedule": "iterative", "levels": [{"density": 0.3}]}
    _, usual = levels(task, recipe_of(**given), tmp_path / "usual")
    _, uniform = levels(task, recipe_of(allocation="uniform", **given), tmp_path / "uniform")
    assert [t[0]["reached"]["allocation"] for t in (usual, uniform)] == ["global", "uniform"]
    recipe = recipe_of(**given)
    program = pare.capture(task.model(), task.inputs())
    way = Way(recipe=recipe, task=task, level=recipe.prune.levels[0], number=1, weights_given=True)
    foreseen = way.foreseen(Here.of(program, None))
    assert foreseen is not None and foreseen.made_by["allocation"] == "global"


def test_a_network_that_nothing_trained_does_not_teach(task: Task, tmp_path: Path) -> None:
    bare = dataclasses.replace(task, base=None)
    recipe = recipe_of(levels=[{"channels": 0.5}])
    seen = task.model()
    seen.a_bn.running_mean += 0.1  # type: ignore[union-attr, operator]
    dense = bare.model()
    for run, network, why in (
        (run_of(bare, recipe, tmp_path), dense, "batch norms have never seen a batch"),
        (run_of(bare, recipe, tmp_path, given=False), seen, "no weights were given"),
    ):
        taught, (note,) = without_random_teacher(run, network)
        assert why in note and "distil: none" in note
        assert taught.recipe.recover.distil == "none" and run.recipe.recover.distil == "kl"
        assert taught.recipe.digest == run.recipe.digest
    for given in (task, dataclasses.replace(bare, train=lambda net: net)):  # trained by its base; or no teacher is read
        assert without_random_teacher(run_of(given, recipe, tmp_path), dense)[1] == ()
    assert without_random_teacher(run_of(bare, recipe, tmp_path), seen)[1] == ()
    weighted = recipe.model_copy(update={"weights": "w.safetensors"})
    assert without_random_teacher(run_of(bare, weighted, tmp_path), dense)[1] == ()
    snip = recipe_of(granularity="element", criterion="snip", levels=[{"density": 0.5}])
    same, (note,) = without_random_teacher(run_of(bare, snip, tmp_path), seen)
    assert same.recipe is snip and "criterion snip is one for untrained networks" in note


class Sides(nn.Module):
    """Answers otherwise while it trains."""

    def __init__(self, training: int, after: int) -> None:
        super().__init__()
        self.sides = nn.ModuleDict({"True": nn.Linear(12, training), "False": nn.Linear(12, after)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sides[str(self.training)](x.flatten(1)[:, :12])


class Wants(nn.Module):
    """Trains with targets alone."""

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        assert target is not None or not self.training, "give targets"
        return x.flatten(1)[:, :1]


def test_what_kl_compares_is_the_answer_of_a_network_that_trains(task: Task, tmp_path: Path) -> None:
    trained = dataclasses.replace(task, base=None)
    run = run_of(trained, recipe_of(levels=[{"channels": 0.5}]), tmp_path)
    for fits in (Sides(10, 1), Wants()):
        check_teacher(run, fits.eval())
        assert not fits.training
    with pytest.raises(UsageError, match=r"Got an output of shape \(\d+, 1\)\. Use distil: mse, or none"):
        check_teacher(run, Sides(1, 10))
    untrained = run.recipe.model_copy(update={"recover": run.recipe.recover.model_copy(update={"epochs": 0})})
    for asks_nothing in (
        dataclasses.replace(run, recipe=untrained),
        dataclasses.replace(run, task=dataclasses.replace(trained, train=lambda net: net)),
    ):
        check_teacher(asks_nothing, Sides(1, 1))


def test_options_of_a_penalty_reach_it(task: Task, tmp_path: Path) -> None:
    given: dict[str, Any] = {"regularize": "growing", "levels": [{"channels": 0.5}]}
    _, told = levels(task, recipe_of(regularize_options={"most": 3, "chosen": "last"}, **given), tmp_path)
    assert told[0]["reached"]["regularize"] == "Growing(epochs=1, most=3, ramp=0.8, chosen='last')"


def test_ranks_by_energy(task: Task, tmp_path: Path) -> None:
    tuned, told = levels(task, recipe_of(levels=[{"energy": 0.6, "factorize": "svd"}]), tmp_path)
    program = pare.capture(task.model(), task.inputs())
    wanted = pare.choose_ranks(program, energy=0.6, align=1)
    assert tuned.plan.ranks == wanted.ranks and told[0]["reached"]["energy"] == 0.6


@pytest.mark.parametrize(
    ("prune", "says"),
    [
        ({"granularity": "row", "schedule_options": {"roundz": 3}, "levels": [{"density": 0.5}]}, "Did you mean 'rounds'?"),
        ({"granularity": "row", "schedule_options": {"rounds": 0}, "levels": [{"density": 0.5}]}, "rounds must be a number ≥ 1"),
        ({"granularity": "row", "schedule_options": {"rounds": 2.5}, "levels": [{"density": 0.5}]}, "rounds must be a whole number"),
        ({"granularity": "2:4", "schedule_options": {"rounds": 3}, "levels": [{}]}, "which N:M brings itself"),
        (
            {"granularity": "row", "schedule_options": {"rounds": 3}, "allocation": "greedy", "levels": [{"density": 0.5}]},
            "allocation uniform, global or erk",
        ),
        (
            {"granularity": "element", "schedule_options": {"rounds": 3}, "criterion": "movement", "levels": [{"density": 0.5}]},
            "a criterion of the table",
        ),
        ({"regularize_options": {"most": 2}, "levels": [{"macs": 0.5}]}, "channels or heads and a penalty"),
        (
            {"regularize": "slimming", "regularize_options": {"most": 2}, "levels": [{"macs": 0.5}]},
            "regularize_options must be among epochs, strength",
        ),
        (
            {"regularize": "growing", "regularize_options": {"most": 0}, "levels": [{"macs": 0.5}]},
            "most of a growing penalty must be a number > 0",
        ),
        ({"schedule": "gradual", "levels": [{"macs": 0.5}]}, "prune.schedule must be used with a level of masks"),
        ({"regularize": "growing", "granularity": "element", "levels": [{"density": 0.5}]}, "channels or heads"),
        ({"criterion": "mouvement", "levels": [{"macs": 0.5}]}, "Did you mean 'movement'?"),
        ({"criterion": "movement", "levels": [{"macs": 0.5}]}, "criterion must score units"),
        ({"criterion_options": {"groop": "all"}, "levels": [{"macs": 0.5}]}, "Did you mean 'group'?"),
        (
            {"granularity": "row", "schedule": "gradual", "schedule_options": {"updats": 3}, "levels": [{"density": 0.5}]},
            "Did you mean 'updates'?",
        ),
        (
            {"granularity": "row", "schedule": "gradual", "allocation": "greedy", "levels": [{"density": 0.5}]},
            "uniform, global or erk where a training prunes",
        ),
        ({"update": "obs", "levels": [{"macs": 0.5}]}, "prune.update must be used with a level of masks"),
        ({"update": "obs", "granularity": "row", "schedule": "gradual", "levels": [{"density": 0.5}]}, "chosen at once"),
        ({"update": "obs", "granularity": "row", "criterion": "movement", "levels": [{"density": 0.5}]}, "chosen at once"),
        ({"update_options": {"block": 8}, "granularity": "row", "levels": [{"density": 0.5}]}, "masks and an update"),
        (
            {"update": "obs", "update_options": {"blok": 8}, "granularity": "row", "levels": [{"density": 0.5}]},
            "Did you mean 'block'?",
        ),
        (
            {"update": "obs", "update_options": {"block": 0}, "granularity": "row", "levels": [{"density": 0.5}]},
            "block must be an integer ≥ 1",
        ),
        (
            {"update": "obs", "update_options": {"damping": "much"}, "granularity": "row", "levels": [{"density": 0.5}]},
            "damping must be a finite number",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(prune: dict[str, Any], says: str, task: Task) -> None:
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        check_ways(recipe_of(**prune), task)


@pytest.mark.parametrize("schedule", ["rigl", "set"])
@pytest.mark.parametrize("sized", [True, False])
def test_masks_that_would_never_move_are_refused_before_any_work(schedule: str, sized: bool, task: Task) -> None:
    """Six batches for four epochs end at three quarters of 24 steps: a mask that moves every 18 steps never does."""
    asked: list[int] = []

    def batches() -> Any:
        found = [*itertools.islice(itertools.cycle(task.train_batches()), 6)]  # type: ignore[misc]
        return found if sized else (asked.append(n) or batch for n, batch in enumerate(found))  # type: ignore[func-returns-value]

    own = dataclasses.replace(task, train_batches=batches)
    prune = {
        "granularity": "element",
        "schedule": schedule,
        "criterion": "random",
        "levels": [{"density": 0.5, "epochs": 4}],
    }
    for every, moves in ((17, True), (18, False), (100, False)):
        recipe = recipe_of(**prune, schedule_options={"every": every})
        if moves:
            check_ways(recipe, own)
            continue
        with pytest.raises(UsageError, match=rf"every must be below 18.*Got every={every} .*24 steps.*{{every: 2}}"):
            check_ways(recipe, own)
    asked.clear()
    check_ways(recipe_of(**prune, schedule_options={"every": 2}), own)
    assert asked == ([] if sized else [0])  # as many as it takes


def of_budget(budget: dict[str, Any], **prune: Any) -> Recipe:
    given = {"schema": 1, "task": "small", "prune": {"align": 1, **prune}, "budget": budget}
    return parse_recipe({**given, "recover": {"epochs": 1, "lr": 0.02, "batch_norm_batches": 2}})


def test_a_budget_that_is_the_one_level_is_checked_as_one(task: Task) -> None:
    check_ways(of_budget({"density": 0.2}, granularity="element", schedule="gradual"), task)
    check_ways(of_budget({"density": 0.2}, granularity="element", update="obs"), task)
    check_ways(of_budget({"channels": 0.5}), task)
    for kind in ("element", "layer"):
        with pytest.raises(UsageError, match=r"budget\.channels must fit what is pruned"):
            check_ways(of_budget({"channels": 0.5}, granularity=kind), task)
    own = dataclasses.replace(task, train=lambda model: model, step=None, train_batches=None)
    with pytest.raises(UsageError):
        check_ways(of_budget({"density": 0.3}, criterion="movement"), own)


def test_as_many_weights_as_there_are_is_met_already(task: Task, tmp_path: Path) -> None:
    recipe = recipe_of(granularity="element", levels=[{"density": 10**7}])
    with pytest.raises(AssertionError):  # nothing was done
        levels(task, recipe, tmp_path)


def test_a_loop_of_ones_own_cannot_be_pruned_in(task: Task) -> None:
    own = dataclasses.replace(task, train=lambda model: model)
    recipe = recipe_of(granularity="element", schedule="gradual", levels=[{"density": 0.5}])
    with pytest.raises(UsageError, match="its own train"):
        check_ways(recipe, own)


def test_options_of_a_criterion_reach_it(task: Task, tmp_path: Path) -> None:
    """Biases and norms can only count where a unit is all that leaves with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"group": "all", "reduction": "mean", "member_norm": "mean", "bias": False}
        tuned, _ = levels(
            task, recipe_of(criterion="taylor", criterion_options=options, levels=[{"macs": 0.6}]), tmp_path
        )
    assert tuned.plan.made_by["criterion_options"].items() >= options.items()
