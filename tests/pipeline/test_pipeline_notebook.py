"""compress(model, inputs, …) without YAML; gates and refusals."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")

from paredown.budget import Budget
from paredown.errors import GateError, InfeasibleError, RejectedError, UsageError
from paredown.pipeline import compress

QUICK = {"measure": {"runs": 5, "seconds": 0.2}, "recover": {"batch_norm_batches": 0}}
METRIC = {"name": "mae", "unit": "g", "goal": "min"}


class Scale(nn.Module):
    """Two inputs, one number: a regression in grams."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.age = nn.Linear(2, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, image: torch.Tensor, *, age: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"grams": self.head(torch.relu(self.image(image) + self.age(age)))}


def samples(num: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "args": (torch.randn(num, 1, 8, 8, generator=generator),),
        "kwargs": {"age": torch.randn(num, 2, generator=generator)},
    }


@pytest.fixture(scope="module")
def job() -> dict:
    model = Scale().eval()
    test = samples(60, 1)
    with torch.no_grad():
        truth = model(*test["args"], **test["kwargs"])["grams"]

    def evaluate(predict) -> dict:
        return {"mae": (predict(*test["args"], **test["kwargs"])["grams"] - truth).abs().flatten().numpy()}

    def train(model: nn.Module) -> None:
        """One's own loop."""
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        data = samples(64, 2)
        with torch.no_grad():
            wanted = teacher(*data["args"], **data["kwargs"])["grams"]
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(*data["args"], **data["kwargs"])["grams"] - wanted).square().mean()
            loss.backward()
            optimizer.step()

    teacher = Scale().eval()
    return {
        "model": model,
        "inputs": samples(2, 3),
        "train": train,
        "calibrate": lambda: [samples(32, 4)],
        "evaluate": evaluate,
    }


def call(job: dict, out: Path, **changes):
    given = {**job, "metric": METRIC, "budget": Budget(channels=0.5), "options": QUICK, **changes}
    return compress(given.pop("model"), given.pop("inputs"), out=out, quiet=True, **given)


def test_own_loop_two_inputs_dict_output(job: dict, tmp_path: Path) -> None:
    before = {n: p.clone() for n, p in job["model"].state_dict().items()}
    result = call(job, tmp_path / "run")
    assert result.artifact.path.exists()
    assert result.module.age.weight.shape == (8, 2), "the user's own class, half the channels"
    assert all(torch.equal(p, before[n]) for n, p in job["model"].state_dict().items()), "the model given is untouched"
    assert "<iframe" in result._repr_html_()
    stages = {r.cell["stage"]: r for r in result.records}
    assert stages["int8"].measured["metric"].unit == "g"


def test_a_bound_that_does_not_hold_is_exit_5_with_a_report(job: dict, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="metric_loss") as caught:
        call(job, tmp_path / "run", budget=Budget(channels=0.5, metric_loss=0.0), train=lambda model: None)
    assert caught.value.exit_code == 5
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow  # test_fault_5 of the command line goes the same way
def test_a_size_that_cannot_be_met_is_exit_4(job: dict, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="size_bytes"):
        call(job, tmp_path / "run", budget=Budget(channels=0.5, size_bytes="100 B"))


def test_what_is_pruned_needs_a_training_and_bits_need_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).eval()
    x, seen = torch.randn(40, 8), torch.randn(40, 8)
    with torch.no_grad():
        truth = net(x)

    def run(name: str, budget: Budget | None = None, **bounds):
        return compress(
            net, seen[:2], out=tmp_path / name, quiet=True, metric=METRIC, calibrate=[seen], budget=budget,
            evaluate=lambda predict: {"mae": (predict(x) - truth).abs().flatten().numpy()},
            options={**QUICK, "budget": bounds},
        )  # fmt: skip

    with pytest.raises(UsageError, match="must be followed by a training"):
        run("level", Budget(macs=0.5))
    assert not (tmp_path / "level").exists()
    with pytest.raises(InfeasibleError, match="Give train, or train_batches and step"):
        run("searched", macs=0.5, together=True)
    assert (tmp_path / "searched" / "report.html").exists()
    whole = run("whole").artifact.size_bytes
    found = run("bits", Budget(size_bytes=whole - 600), trials=1)
    assert found.artifact.size_bytes <= whole - 600 and not found.plan.keep
    with pytest.raises(InfeasibleError, match=r"in 1 trials\. Allow fewer bits \(budget.bits\), give train"):
        run("small", Budget(size_bytes=400), trials=1)


def test_without_a_budget_nothing_is_pruned(job: dict, tmp_path: Path) -> None:
    result = call(job, tmp_path / "run", budget=None)
    assert [r.cell["stage"] for r in result.records] == ["examine", "dense", "int8", "verdict"]


def test_budget_and_options_are_put_together_and_never_lost(job: dict, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError):  # the size that is asked for is still asked for
        call(job, tmp_path / "a", budget=Budget(size_bytes=10), options={**QUICK, "budget": {"rounds": 2}})
    for budget, more in (
        (Budget(size_bytes=10), {"budget": {"size_bytes": 0.5}}),
        (Budget(channels=0.5), {"prune": {"levels": [{"macs": 0.5}]}}),
    ):
        with pytest.raises(UsageError, match=r"must not say the same\. Got (size_bytes|prune\.levels) in both"):
            call(job, tmp_path / "b", budget=budget, options={**QUICK, **more})


def test_a_missing_direction_is_refused(job: dict, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="goal"):
        call(job, tmp_path / "run", metric={"name": "mae", "unit": "g", "goal": "lower"})
    with pytest.raises(UsageError, match="metric"):
        call(job, tmp_path / "run", metric=None)


def test_calibration_data_that_is_test_data_is_refused(job: dict, tmp_path: Path) -> None:
    from paredown.pipeline.compress import _notebook_recipe, _run
    from paredown.train import Metric, Task

    shared = samples(16, 7)
    task = Task(
        name="t",
        model=Scale,
        inputs=lambda: samples(2, 3),
        calibration_batches=lambda: [shared],
        test_batches=lambda: [shared],
        evaluate=job["evaluate"],
        metric=Metric(**METRIC),
        train=lambda m: None,
    )
    recipe = _notebook_recipe(None, "onnxruntime-x86", QUICK, {})
    with pytest.raises(RejectedError, match="calibration"):
        _run(recipe, task, Scale, True, tmp_path / "run", overwrite=False, quiet=True)


def test_fault_49_an_evaluation_that_reads_what_was_calibrated_on_is_refused(job: dict, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"calibration_batches .* what evaluate gives the network. Got 60 of 60"):
        call(job, tmp_path / "run", calibrate=lambda: [samples(60, 1)])
    assert not (tmp_path / "run" / "int8.onnx").exists()


def test_nan_in_the_metric_is_refused(job: dict, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="NaN"):
        call(job, tmp_path / "run", evaluate=lambda predict: {"mae": float("nan")})


def test_the_same_cell_goes_on_and_another_function_is_refused(job: dict, tmp_path: Path) -> None:
    def cell(factor: float, **more: object):
        def train(model: nn.Module) -> None:
            note(factor)
            with torch.no_grad():
                model.head.weight.mul_(factor)

        return call(job, tmp_path / "run", train=train, **more)

    def note(factor: float) -> None:
        file.write_text(f"{file.read_text()} {factor}" if file.exists() else str(factor))

    file = tmp_path / "trained.txt"
    first = cell(1.5)
    again = cell(1.5)
    assert file.read_text() == "1.5", "the same cell, run again, goes on where it was"
    assert torch.equal(first.module.head.weight, again.module.head.weight)
    with pytest.raises(UsageError, match=r"given\.train\.factor: \"1\.5\" → \"2\.0\""):
        cell(2.0)
    with pytest.raises(UsageError, match=r"given\.evaluate: "):
        cell(1.5, evaluate=lambda predict: {"mae": 0.0})
    with pytest.raises(UsageError, match=r"given\.metric: \"mae in g, min\" → \"mae in kg, min\""):
        cell(1.5, metric={**METRIC, "unit": "kg"})
    assert file.read_text() == "1.5"
    other = cell(2.0, overwrite=True)
    assert file.read_text() == "1.5 2.0"
    assert torch.allclose(other.module.head.weight, first.module.head.weight * 2 / 1.5)


def test_a_function_that_cannot_be_compared_is_told_and_not_reused(job: dict, tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("w") as log:

        def train(model: nn.Module) -> None:
            log.write("trained\n")

        result = call(job, tmp_path / "run", train=train)
        assert any("given.train.log" in w or "train.log" in w for w in result.verdict["warnings"])
        with pytest.raises(UsageError, match=r"train\.log: .*not comparable \(TextIOWrapper"):
            call(job, tmp_path / "run", train=train)


def pruned_by_torch() -> tuple[nn.Module, torch.Tensor]:
    """Scale with one of two age weights of every unit masked by torch.nn.utils.prune, and which stay."""
    model = Scale().eval()
    stay = torch.arange(32).reshape(16, 2) // 2 % 2 == torch.arange(2)
    prune.custom_from_mask(model.age, "weight", stay)
    return model, stay


def mean_error(model: nn.Module, batch: dict) -> torch.Tensor:
    return (model(*batch["args"], **batch["kwargs"])["grams"] - 1.0).square().mean()


BESIDE_MASKS = {
    "nothing more": (None, {}, False),
    "channels, own loop": (Budget(channels=0.5), {}, True),
    "channels, step": (Budget(channels=0.5), {}, False),
    "bounds that are searched": (None, {"budget": {"macs": 0.7}}, False),
}


@pytest.mark.parametrize("asked", BESIDE_MASKS)
def test_masks_of_torch_stay_to_the_last_file(job: dict, tmp_path: Path, asked: str) -> None:
    model, stay = pruned_by_torch()
    budget, more, own_loop = BESIDE_MASKS[asked]
    loop = {} if own_loop else {"train": None, "train_batches": lambda: [samples(32, 5)] * 4, "step": mean_error}
    options = {**QUICK, "recover": {"batch_norm_batches": 0, "epochs": 1, "distil": "none"}, **more}
    result = call(job, tmp_path / "run", model=model, budget=budget, options=options, **loop)
    kept = [*result.plan.keep.get("age.weight", {}).get(0, range(16))]
    assert (len(kept) < 16) == (asked != "nothing more")
    assert torch.equal(result.module.age.weight.detach() != 0, stay[kept])
    stages = {r.cell["stage"]: r for r in result.records}
    assert any("took over the masks of torch.nn.utils.prune" in n for n in stages["examine"].details["notes"])
    assert stages["int8"].plan_digest == result.plan.digest
    assert hasattr(model.age, "weight_mask"), "the model given is untouched"


class Newborn(nn.Module):
    """A network with a batch norm that nothing has trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(16, 1)

    def forward(self, image: torch.Tensor, *, age: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"grams": self.head(self.image(image)) + age.sum(1, keepdim=True)}


def test_an_untrained_network_is_no_teacher_and_the_records_say_so(job: dict, tmp_path: Path) -> None:
    loop = {"train": None, "train_batches": lambda: [samples(32, 5)] * 4, "step": mean_error}
    made = {}
    for distil in ("mse", "none"):
        options = {**QUICK, "recover": {"batch_norm_batches": 0, "epochs": 1, "distil": distil}}
        made[distil] = call(job, tmp_path / distil, model=Newborn(), options=options, **loop)
    weights = [m.module.state_dict() for m in made.values()]
    assert all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())
    told = "recover.distil mse was left out: the dense network, which would teach, is untrained"
    stages = {r.cell["stage"]: r for r in made["mse"].records}
    for notes in (stages["examine"].details["notes"], made["mse"].verdict["warnings"]):
        assert any(told in n and "batch norms have never seen a batch" in n for n in notes)
    assert not any("recover.distil" in n for n in made["none"].verdict["warnings"])


def test_one_output_column_cannot_be_distilled_by_kl_and_that_is_told_first(job: dict, tmp_path: Path) -> None:
    loop = {"train": None, "train_batches": lambda: [samples(32, 5)] * 4, "step": mean_error}
    options = {**QUICK, "recover": {"batch_norm_batches": 0, "epochs": 1}, "budget": {"macs": 0.7}}
    with pytest.raises(
        UsageError, match=r"two classes to compare\. Got an output of shape \(\d+, 1\)\. Use distil: mse"
    ):
        call(job, tmp_path / "run", model=Scale(), options=options, **loop)
    assert not [*(tmp_path / "run").rglob("*.onnx")], "told before any file is made"
