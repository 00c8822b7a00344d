"""What a recipe can ask of quantization: repairs, layers in float, training with rounding in place."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import paredown as pare
from paredown.errors import UsageError
from paredown.export import predictor
from paredown.export.session import has_exact_products
from paredown.pipeline.folder import RunFolder
from paredown.pipeline.run import Run
from paredown.pipeline.stages import quantized_of
from paredown.pipeline.ways import check_ways
from paredown.recipe import parse_recipe
from paredown.records import read
from paredown.train import Task

pytest.importorskip("torchao")


def quantized(
    task: Task, out: Path, budget: dict[str, Any] | None = None, **asked: Any
) -> tuple[pare.Quantized, torch.nn.Module, list[Any]]:
    recipe = parse_recipe({"schema": 1, "task": "small", "quantize": asked, "budget": budget or {}})
    torch.manual_seed(0)
    dense = task.model()
    folder = RunFolder(path=out)
    folder.steps.mkdir(exist_ok=True, parents=True)
    told: list[Any] = []
    run = Run(
        recipe=recipe, task=task, folder=folder, say=lambda _: None, on_training=lambda *a: told.append(a), weights_given=True,
        model=lambda: dense, environment={"versions": {}},
    )  # fmt: skip
    return quantized_of(run, pare.capture(dense, task.inputs()), dense), dense, told


def test_training_with_rounding_starts_where_calibration_ends_and_moves_on(task: Task, tmp_path: Path) -> None:
    plain, _, none = quantized(task, tmp_path / "a")
    trained, _, told = quantized(task, tmp_path / "b", epochs=1, lr=0.01)
    assert not none and told and {a[0] for a in told} == {"train with rounding"}
    assert trained.weights.keys() == plain.weights.keys()
    assert any(not torch.equal(trained.weights[n].codes, p.codes) for n, p in plain.weights.items())
    again, _, _ = quantized(task, tmp_path / "c", epochs=1, lr=0.01)
    assert all(torch.equal(again.weights[n].codes, p.codes) for n, p in trained.weights.items())


def test_repairs_and_layers_in_float_reach_the_verb(task: Task, tmp_path: Path) -> None:
    plain, _, _ = quantized(task, tmp_path / "a")
    repaired, _, _ = quantized(task, tmp_path / "b", repair=["gptq"])
    assert any(not torch.equal(repaired.weights[n].codes, p.codes) for n, p in plain.weights.items())
    name = next(iter(plain.weights))
    less, _, _ = quantized(task, tmp_path / "c", float_layers=[name])
    assert set(less.weights) == set(plain.weights) - {name}


def test_wrong_requests_are_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="repair"):
        parse_recipe({"schema": 1, "task": "small", "quantize": {"repair": ["magic"]}})
    with pytest.raises(UsageError, match="matches none"):
        quantized(task, tmp_path / "a", float_layers=["no.such.layer"])


def test_spare_puts_layers_in_float_and_notes_what_they_cost(task: Task, tmp_path: Path) -> None:
    assert task.train_batches is not None
    torch.manual_seed(0)
    x = torch.cat([batch[0] for batch in task.train_batches()])

    def uneven() -> torch.nn.Module:
        """The same function; between b and c one channel is a thousand times another, which no range per tensor fits."""
        net, scales = task.model().eval(), torch.logspace(0, 3, 16)
        with torch.no_grad():
            net.b_bn.weight.mul_(scales)
            net.b_bn.bias.mul_(scales)
            net.c.weight.div_(scales.reshape(1, -1, 1, 1))
        return net

    with torch.no_grad():
        wanted = task.model().eval()(x)

    def choose(predict: Any) -> dict[str, Any]:
        """100 less what the outputs are off, in thousandths: rounding has something to take, whatever the weights are."""
        return {"accuracy": 100 - 1000 * (predict(x) - wanted).abs().mean(1).numpy()}

    held = dataclasses.replace(task, model=uneven, choose_batches=lambda: [x], choose=choose)
    plain, _, _ = quantized(held, tmp_path / "a")
    lost = 100 - choose(predictor(plain))["accuracy"].mean()
    few, _, _ = quantized(held, tmp_path / "b", budget={"metric_loss": float(0.5 * lost)}, spare=True)
    note = next(n for n in few.notes if n.startswith("spare: "))
    in_float = set(plain.weights) - set(few.weights)
    assert in_float == {"b.weight", "c.weight"} and "2 layers in float" in note and "estimated" in note
    assert 100 - choose(predictor(few))["accuracy"].mean() <= 0.5 * lost + 1e-6
    none, _, _ = quantized(held, tmp_path / "c", budget={"metric_loss": 0.0}, spare=True)
    assert set(none.weights) == set(plain.weights) and any("all layers are quantized" in n for n in none.notes)


def test_spare_needs_a_bound_and_data_to_choose_on(task: Task, tmp_path: Path) -> None:
    held = dataclasses.replace(task, choose_batches=list, choose=lambda _: {"accuracy": 0.0})
    with pytest.raises(UsageError, match=r"spare must have budget.metric_loss"):
        quantized(held, tmp_path / "a", spare=True)
    with pytest.raises(UsageError, match="choose_batches"):
        quantized(dataclasses.replace(task, choose=None), tmp_path / "b", budget={"metric_loss": 1.0}, spare=True)
    with pytest.raises(UsageError, match=r"without quantize.epochs"):
        quantized(held, tmp_path / "c", budget={"metric_loss": 1.0}, spare=True, epochs=1)


@pytest.mark.parametrize("scheme", [pytest.param("w4a8", marks=pytest.mark.slow), "w4a4", "int8-dynamic", "fp16"])
def test_another_scheme_has_a_stage_a_file_and_a_verdict_of_its_name(task: Task, tmp_path: Path, scheme: str) -> None:
    import onnx

    done = pare.compress(
        {
            "schema": 1, "task": str(Path(__file__).with_name("small_task.py")), "quantize": {"scheme": scheme},
            "prune": {"levels": [{"channels": 0.5}]}, "recover": {"epochs": 1, "batch_norm_batches": 2},
            "measure": {"runs": 5, "seconds": 0.2}, "budget": {"metric_loss": 100},
        },
        out=tmp_path / "run",
    )  # fmt: skip
    assert done.recommended == scheme == done.artifact.scheme
    assert done.artifact.path.name == f"{scheme}.onnx" and done.artifact.path.is_file()
    assert f"InferenceSession('{scheme}.onnx'" in done.verdict["snippet"]
    assert f"InferenceSession('{done.verdict['otherwise']}.onnx'" in done.verdict["otherwise_snippet"]
    kinds = {t.data_type for t in onnx.load(done.artifact.path).graph.initializer}
    assert (
        onnx.TensorProto.FLOAT16 if scheme == "fp16" else onnx.TensorProto.UINT8
    ) in kinds  # of w4a8 two codes to a byte
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert {"w4a8": "W4A8", "w4a4": "W4A4", "int8-dynamic": "dynamic INT8", "fp16": "FP16"}[scheme] in page
    assert ("exact int8 sums" in done.verdict["snippet"]) == (
        scheme != "fp16" and not has_exact_products(done.artifact.path)
    )
    if scheme == "w4a4":
        made = next(r for r in read(tmp_path / "run" / "records.jsonl") if r.cell["stage"] == "w4a4")
        assert (
            "kernels of 8 bits" in " ".join(made.details["notes"])
            and made.measured["simulated_metric"].value is not None
        )
        assert made.details["layers_on_codes"]["on_codes"] == made.details["layers_on_codes"]["of"] > 0
    if scheme == "fp16":
        bits = next(r for r in read(tmp_path / "run" / "records.jsonl") if r.cell["stage"] == "insight").details["bits"]
        assert (
            all(row["bits"] == 16 and 60 < row["weight_db"] < 90 for row in bits["layers"])
            and "weights in 16 bits" in page
        )


def test_schemes_without_samples_or_for_other_targets_are_refused_before_any_work(task: Task) -> None:
    with pytest.raises(UsageError, match="reads no samples"):
        parse_recipe({"schema": 1, "task": "small", "quantize": {"scheme": "w4", "repair": ["gptq"]}})
    recipe = parse_recipe({"schema": 1, "task": "small", "target": "openvino-x86", "quantize": {"scheme": "w2"}})
    with pytest.raises(UsageError, match="onnxruntime-x86, onnxruntime-arm for the scheme w2"):
        check_ways(recipe, task)
