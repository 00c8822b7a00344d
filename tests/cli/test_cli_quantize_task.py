"""paredown quantize with a task: training with rounding, layers put back in float, bits for a size, 4-bit activations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from paredown.cli.coding import BITS
from paredown.cli.coding import LR as CLI_LR
from paredown.quantize.packed import load_packed
from paredown.recipe_fields import Bounds, Quantize

pytest.importorskip("torchao")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SOURCE = '''
"""Four classes by the signs of two of eight numbers, one of which is a hundred times as large as the others."""
import torch
from torch import nn
from torch.nn import functional as F

METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}
WIDE = torch.tensor([100.0] + [1.0] * 7)


def _drawn(num, seed):
    x = torch.randn(num, 8, generator=torch.Generator().manual_seed(seed)) * WIDE
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def _split(num, seed):
    return list(zip(*(torch.split(t, 32) for t in _drawn(num, seed))))


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    made[0].weight.data /= WIDE
    optimizer = torch.optim.Adam(made.parameters(), 0.003)
    for _ in range(4):
        for batch in _split(512, 1):
            optimizer.zero_grad()
            step(made, batch).backward()
            optimizer.step()
    return made


def model():
    return net()


def inputs():
    return torch.zeros(2, 8)


def train_batches():
    return _split(512, 1)


def calibration_batches():
    return [x for x, _ in _split(64, 2)]


def choose_batches():
    return _split(256, 2)


def test_batches():
    return _split(256, 3)


def step(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluate(predict, batches):
    return {"accuracy": 100.0 * torch.cat([(predict(x).argmax(1) == y).float() for x, y in batches]).numpy()}
'''
OWN_LOOP = (
    SOURCE.replace("def step(", "def _step(").replace("step(made", "_step(made")
    + "\n\ndef train(model):\n    return model\n"
)
BASE = SOURCE.replace(
    "def model():\n    return net()",
    "def model():\n    torch.manual_seed(9)\n    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))"
    "\n\n\ndef base():\n    return net()",
)
NO_CHOICE = SOURCE.replace("def choose_batches", "def _choose_batches")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("task")
    for name, text in (("own", SOURCE), ("loop", OWN_LOOP), ("base", BASE), ("nochoice", NO_CHOICE)):
        (made / f"{name}.py").write_text(text, encoding="utf-8")
    return made


@pytest.fixture
def asked(folder: Path) -> tuple[str, ...]:
    return ("quantize", f"{folder / 'own.py'}:net", "--input", "2x8", "--task", str(folder / "own.py"))


def own(folder: Path) -> dict:
    space: dict = {}
    exec((folder / "own.py").read_text(encoding="utf-8"), space)
    return space


def accuracy(file: str, folder: Path) -> float:
    """By ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(file)
    name = session.get_inputs()[0].name
    hits = [session.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy() for x, y in own(folder)["choose_batches"]()]
    return float(100 * np.concatenate(hits).mean())


def test_the_usual_values_are_those_of_a_recipe():
    assert Quantize().lr == CLI_LR and Bounds().bits == BITS


def test_a_task_calibrates_and_its_metric_is_measured_on_held_out_data(call, asked, folder):
    done = call(*asked, "--out", "a.onnx", "--json")
    assert done.code == 0, done.err
    metric = done.json["metric"]
    assert (done.json["calibrated_on"], metric["data"], metric["badge"]) == ("task", "held-out", "measured")
    assert metric["codes"] == pytest.approx(accuracy("a.onnx", folder))
    x, y = (torch.cat(t) for t in zip(*own(folder)["choose_batches"](), strict=True))
    dense = own(folder)["net"]()
    assert metric["float"] == pytest.approx(100 * float((dense(x).argmax(1) == y).float().mean()))
    assert set(done.json["bits"].values()) == {8}


def test_training_with_rounding_lowers_what_rounding_cost(call, asked, folder):
    """Ternary weights without a repair lose; trained on, the file scores higher than the one that was not."""
    scheme = ("--scheme", "ternary")
    plain = call(*asked, *scheme, "--out", "a.onnx", "--json").json
    done = call(*asked, *scheme, "--epochs", "3", "--lr", "0.01", "--out", "b.onnx", "--json")
    assert done.code == 0, done.err
    found = done.json["training"]
    assert (found["epochs"], found["lr"], found["teacher"], found["distil"]) == (3, 0.01, "itself in float", "kl")
    losses = [row["loss"] for row in found["history"]]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert all(row["samples"] == 512 for row in found["history"])
    assert done.json["check"]["holds"]
    assert done.json["metric"]["codes"] == pytest.approx(accuracy("b.onnx", folder))
    assert accuracy("b.onnx", folder) > accuracy("a.onnx", folder) + 1
    assert done.json["metric"]["float"] == plain["metric"]["float"]
    assert sorted(p.name for p in Path().iterdir()) == ["a.onnx", "b.onnx"], "no checkpoint stays"


def test_training_is_the_same_twice_and_another_without_its_teacher(call, asked):
    ask = (*asked, "--scheme", "w4a8", "--epochs", "1", "--max-steps", "3")
    for name, more in (("a", ()), ("b", ()), ("c", ("--distil", "none")), ("d", ("--seed", "1"))):
        done = call(*ask, *more, "--out", f"{name}.onnx", "--json")
        assert done.code == 0, done.err
        assert (done.json["training"]["teacher"] is None) == (name == "c")
        assert done.json["training"]["history"][0]["samples"] == 96
    a, b, c, _ = (Path(f"{n}.onnx").read_bytes() for n in "abcd")
    assert a == b != c


def test_a_training_that_was_stopped_goes_on_from_beside_the_file(call, asked, monkeypatch):
    """The whole command, and the same with an interruption in its second epoch: one file, byte for byte."""
    from paredown.train import loop

    ask = (*asked, "--scheme", "w4a8", "--epochs", "2", "--max-steps", "2")
    assert call(*ask, "--out", "whole.onnx").code == 0
    calls, real = [], loop.learning_rate

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "learning_rate", stopping)
    done = call(*ask, "--out", "b.onnx")
    monkeypatch.setattr(loop, "learning_rate", real)
    assert done.code == 130, done.err
    assert Path("b.onnx.training.safetensors").is_file() and not Path("b.onnx").exists()
    done = call(*ask, "--out", "b.onnx")
    assert done.code == 0, done.err
    assert Path("b.onnx").read_bytes() == Path("whole.onnx").read_bytes()
    assert not Path("b.onnx.training.safetensors").exists()


def test_a_target_that_is_not_set_up_is_refused_before_the_training(call, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("PAREDOWN_ENVIRONMENTS", str(tmp_path / "none"))
    done = call(*asked, "--epochs", "1", "--target", "executorch-xnnpack", "--out", "a.pte")
    assert (done.code, "paredown setup executorch-xnnpack" in done.err) == (8, True), done.err
    assert "epoch 1" not in done.err and list(tmp_path.iterdir()) == []


def test_a_training_stays_until_its_file_is_written(call, asked):
    ask = (*asked, "--epochs", "1", "--max-steps", "2", "--out", "a.onnx")
    done = call(*ask, "--opset", "99")
    assert done.code != 0 and not Path("a.onnx").exists()
    assert Path("a.onnx.training.safetensors").is_file()
    done = call(*ask, "--json")
    assert done.code == 0, done.err
    assert len(done.json["training"]["history"]) == 1
    assert not Path("a.onnx.training.safetensors").exists()


def test_what_is_written_takes_no_weights_that_are_read(call, folder, tmp_path):
    """Packed weights have the suffix of a folder's own weights."""
    model = f"{folder / 'own.py'}:net"
    ask = ("--input", "2x8", "--granularity", "element", "--density", "0.5", "--out", "masked")
    assert call("prune", model, *ask).code == 0
    before = Path("masked/model.safetensors").read_bytes()
    ask = ("quantize", model, "--input", "2x8", "--pruned", "masked", "--task", folder / "own.py", "--scheme", "w4a4")
    done = call(*ask, "--out", "masked/model.safetensors", "--overwrite")
    assert (done.code, "--out must not be the file of the pruned model" in done.err) == (2, True), done.err
    assert Path("masked/model.safetensors").read_bytes() == before
    (tmp_path / "masked" / "recipe.yaml").write_text("schema: 1\n", encoding="utf-8")
    (tmp_path / "masked" / "steps").mkdir()
    for name in ("model.safetensors", "steps/base-trained.safetensors"):
        (tmp_path / "masked" / name).touch()
        done = call("quantize", "masked", "--scheme", "w4a4", "--out", f"masked/{name}", "--overwrite")
        assert (done.code, "--out must not be the file of the pruned model" in done.err) == (2, True), done.err


def test_a_file_that_was_not_compared_does_not_stay(call, folder, tmp_path):
    """A network that takes any size, and a task whose samples have another one than --input."""
    (tmp_path / "any.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 4))\n",
        encoding="utf-8",
    )
    ask = ("quantize", f"{tmp_path / 'any.py'}:net", "--input", "2x12", "--task", folder / "own.py")
    done = call(*ask, "--out", "a.onnx")
    assert (done.code, "samples must be" in done.err) == (3, True), done.err
    assert [p.name for p in tmp_path.iterdir()] == ["any.py"]


def variant(folder: Path, place: Path, **functions: str) -> tuple[str, ...]:
    """The same task with other functions, as a request."""
    more = "".join(f"\n\ndef {name}{rest}\n" for name, rest in functions.items())
    (place / "variant.py").write_text(SOURCE + more, encoding="utf-8")
    return (
        "quantize",
        f"{folder / 'own.py'}:net",
        "--input",
        "2x8",
        "--task",
        str(place / "variant.py"),
        "--out",
        "a.onnx",
    )


def test_fault_49_test_data_calibrate_nothing(call, folder, tmp_path):
    on_test = "():\n    return [x for x, _ in test_batches()]"
    done = call(*variant(folder, tmp_path, calibration_batches=on_test))
    assert (done.code, "must not share samples with test_batches. Got 256 of 256" in done.err) == (3, True), done.err
    assert "quantize\n" not in done.err, "before any work"
    np.save("x.npy", torch.cat([x for x, _ in own(folder)["test_batches"]()])[:40].numpy())
    done = call(*variant(folder, tmp_path), "--calibrate", "x.npy")
    assert (done.code, "--calibrate must not share samples with test_batches. Got 40 of 40" in done.err) == (3, True), (
        done.err
    )
    own_data = "(predict):\n    return {'accuracy': torch.cat([100.0 * (predict(x).argmax(1) == y) for x, y in _split(64, 2)])}"
    done = call(*variant(folder, tmp_path, evaluate=own_data))
    assert (done.code, "with what evaluate gives the network. Got 64 of 64" in done.err) == (3, True), done.err
    done = call(
        *variant(folder, tmp_path, calibration_batches="():\n    return [x for x, _ in choose_batches()][:1]"), "--json"
    )
    assert done.code == 0, done.err
    assert (
        "32 of 256 held-out samples are also calibration samples: the held-out figures are too good."
        in done.json["notes"]
    )


def test_a_loader_without_end_calibrates_with_a_number_of_samples(call, folder, tmp_path):
    endless = "():\n    return (torch.randn(16, 8) * WIDE for _ in iter(int, 1))"
    done = call(*variant(folder, tmp_path, calibration_batches=endless), "--samples", "40", "--json")
    assert done.code == 0, done.err
    assert not any("samples; below" in n for n in done.json["notes"])


def test_fault_48_nothing_is_written_where_the_metric_has_no_data_or_fails(call, folder, tmp_path):
    for changes, says in (
        ({"choose_batches": "():\n    return []"}, "choose_batches must yield at least one batch"),
        ({"calibration_batches": "():\n    return []"}, "calibration_batches must yield at least one batch"),
        ({"evaluate": "(predict, batches):\n    return {'accuracy': float('nan')}"}, "must be a finite number"),
    ):
        done = call(*variant(folder, tmp_path, **changes))
        assert (done.code, says in done.err) == (3, True), done.err
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["variant.py"]


def test_the_fewest_layers_go_back_to_float(call, asked, folder):
    ask = (*asked, "--scheme", "ternary")
    lost = call(*ask, "--out", "a.onnx", "--json").json["metric"]
    gap = lost["float"] - lost["codes"]
    assert gap > 1
    done = call(*ask, "--spare", "--metric-loss", f"{gap / 2:.3f}", "--out", "b.onnx", "--json")
    assert done.code == 0, done.err
    found = done.json["spare"]
    assert 1 <= len(found["float_layers"]) <= 2
    assert found["reference"] - found["value"] <= gap / 2 < found["reference"] - found["before"]
    assert not set(found["float_layers"]) & set(done.json["bits"])
    assert lost["float"] - accuracy("b.onnx", folder) <= gap / 2 + 0.5
    held = {tuple(t.dims): t.data_type for t in onnx.load("b.onnx").graph.initializer}
    shapes = {n: tuple(p.shape) for n, p in own(folder)["net"]().named_parameters()}
    floats = {s for s, kind in held.items() if kind == onnx.TensorProto.FLOAT and len(s) == 2}
    assert all({shapes[n], shapes[n][::-1]} & floats for n in found["float_layers"])
    done = call(*asked, "--spare", "--metric-loss", "50", "--out", "c.onnx")
    assert done.code == 0 and "layers put in float none" in " ".join(done.out.split())


def test_a_bound_that_no_layer_in_float_meets_writes_nothing(call, asked):
    """Against weights of another network as the dense one, which scores higher than this one does in float."""
    good = own(Path(asked[1].rpartition(":")[0]).parent)["net"]()
    torch.save(good.state_dict(), "dense.pt")
    with torch.no_grad():
        good[4].bias.add_(torch.tensor([0.0, 0.0, 0.0, 3.0]))
    torch.save(good.state_dict(), "worse.pt")
    ask = (*asked, "--weights", "worse.pt", "--teacher", "dense.pt", "--spare", "--metric-loss", "0.5")
    done = call(*ask, "--out", "a.onnx")
    assert (done.code, "must be enough to meet the bound" in done.err) == (4, True), done.err
    assert not Path("a.onnx").exists()


def test_bits_are_chosen_for_a_size(call, asked):
    whole = call(*asked, "--out", "a.onnx", "--json").json["file_bytes"]
    limit = whole - 1500
    done = call(
        *asked, "--size-bytes", f"{limit} B", "--bits", "8", "--bits", "4", "--bits", "2", "--out", "b.onnx", "--json"
    )
    assert done.code == 0, done.err
    found = done.json
    assert found["file_bytes"] == Path("b.onnx").stat().st_size <= limit
    assert found["size_bytes"] == {"asked": limit, "with_8_bits": whole}
    assert set(found["bits"].values()) <= {8, 4, 2} and min(found["bits"].values()) < 8
    assert found["check"]["holds"]
    done = call(*asked, "--size-bytes", "1 MB", "--out", "c.onnx", "--json")
    assert set(done.json["bits"].values()) == {8} and Path("c.onnx").read_bytes() == Path("a.onnx").read_bytes()
    done = call(*asked, "--size-bytes", "100 B", "--out", "d.onnx")
    assert (done.code, "Allow narrower --bits" in done.err) == (4, True), done.err
    assert not Path("d.onnx").exists()


def test_four_bit_activations_are_simulated_beside_packed_weights_and_run_in_a_file(call, asked, folder):
    done = call(*asked, "--scheme", "w4a4", "--out", "a.safetensors", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert (found["check"], found["runtime"], found["int8_nodes"]) == (None, None, [])
    assert "no runtime multiplies 4-bit codes" in found["simulated"]
    assert found["metric"]["badge"] == found["rounding"]["badge"] == "simulated"
    weights = load_packed("a.safetensors")
    assert {n: w.bits for n, w in weights.items()} == found["bits"] == {"0.weight": 8, "2.weight": 4, "4.weight": 8}
    assert found["packed"]["codes_bytes"] == 8 * 64 + 64 * 64 // 2 + 64 * 4
    assert found["file_bytes"] == Path("a.safetensors").stat().st_size
    dense = own(folder)["net"]()
    for name, weight in dense.named_parameters():
        if name in weights:
            assert float((weights[name].unpack() - weight).norm() / weight.norm()) < (
                0.2 if name == "2.weight" else 0.02
            )
    trained = call(*asked, "--scheme", "w4a4", "--epochs", "1", "--out", "b.safetensors", "--json").json
    assert trained["check"] is None and len(trained["training"]["history"]) == 1
    assert not torch.equal(load_packed("b.safetensors")["2.weight"].codes, weights["2.weight"].codes)
    said = " ".join(call(*asked, "--scheme", "w4a4", "--out", "c.safetensors").out.split())
    assert "simulated" in said and "no runtime multiplies" in said
    run = call(*asked, "--scheme", "w4a4", "--out", "d.onnx", "--json")
    assert run.code == 0 and run.json["check"]["holds"], run.err
    assert run.json["metric"]["badge"] == "measured" and run.json["metric"]["codes"] == pytest.approx(
        found["metric"]["codes"]
    )
    assert any("kernels of 8 bits" in note for note in run.json["notes"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--lr", "0.1"], "--lr must come with --epochs"),
        (["--distil", "mse"], "--distil must come with --epochs"),
        (["--epochs", "0"], "--epochs must be an integer ≥ 1"),
        (["--spare"], "--spare must come with --metric-loss"),
        (["--metric-loss", "1"], "--metric-loss must come with --spare"),
        (["--metric-loss", "-1", "--spare"], "--metric-loss must be a number ≥ 0"),
        (["--spare", "--metric-loss", "1", "--epochs", "1"], "--spare must go without --epochs"),
        (["--spare", "--metric-loss", "1", "--size-bytes", "1 kB"], "--spare must go without --size-bytes"),
        (["--bits", "4"], "--bits must come with --size-bytes"),
        (["--bits", "9", "--size-bytes", "1 kB"], "--bits must be widths from 1 to 8"),
        (["--bits", "8", "--size-bytes", "1 kB"], "one below 8"),
        (["--size-bytes", "1 kB", "--scheme", "w4a8"], "--size-bytes must be met by bits per layer"),
        (["--size-bytes", "1 kB", "--target", "openvino-x86"], "--size-bytes must be met by bits per layer"),
        (["--epochs", "1", "--scheme", "w4"], "--epochs must be left out for the scheme w4"),
        (["--spare", "--metric-loss", "1", "--scheme", "int8-dynamic"], "--spare must be left out"),
        (["--teacher", "own.py"], "--teacher must come with --epochs"),
        (["--device", "cuda"], "--device must be cpu"),
    ],
)
def test_options_that_do_not_go_together_are_refused(call, asked, tmp_path, more, says):
    done = call(*asked, *more, "--out", "x.onnx")
    assert (done.code, says in " ".join(done.err.split())) == (2, True), done.err
    assert list(tmp_path.iterdir()) == []


def test_what_a_task_lacks_is_said(call, asked, folder, tmp_path):
    bare = asked[:4]
    for more, says in (
        (["--epochs", "1", "--calibrate", "random"], "--epochs must come with --task"),
        (["--spare", "--metric-loss", "1", "--calibrate", "random"], "--spare must come with --task"),
        (["--data", "d", "--calibrate", "random"], "--data must come with --task"),
        (["--epochs", "1", "--task", folder / "loop.py"], "step(model, batch) and train_batches"),
        (["--spare", "--metric-loss", "1", "--task", folder / "nochoice.py"], "choose_batches and evaluate"),
        (
            ["--out", "y.safetensors", "--calibrate", "random"],
            "--out must be the file that the target's runtime executes",
        ),
    ):
        done = call(*bare, *more, *(() if "--out" in more else ("--out", "x.onnx")))
        assert (done.code, says in " ".join(done.err.split())) == (2, True), done.err
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_network_teaches_nothing(call, folder, tmp_path):
    (tmp_path / "fresh.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))\n",
        encoding="utf-8",
    )
    ask = ("quantize", f"{tmp_path / 'fresh.py'}:net", "--input", "2x8", "--task", folder / "own.py")
    done = call(*ask, "--epochs", "1", "--max-steps", "2", "--out", "a.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json["training"]["teacher"] is None
    assert any("distillation was left out" in n for n in done.json["notes"])


def test_the_dense_network_of_a_run_teaches(call, folder, tmp_path):
    """The folder of a run that pruned: its recipe names task and dense model, whose weights are those that it came with."""
    model = f"{folder / 'own.py'}:net"
    done = call("prune", model, "--input", "2x8", "--channels", "0.5", "--align", "1", "--out", "small")
    assert done.code == 0, done.err
    recipe = (
        f"schema: 1\nname: small\ntask: {json.dumps(str(folder / 'own.py'))}\nprune: {{levels: [{{channels: 0.5}}]}}\n"
    )
    (tmp_path / "small" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    done = call("quantize", "small", "--epochs", "1", "--out", "a.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json["training"]["teacher"] == "dense"
    other = call("quantize", "small", "--epochs", "1", "--distil", "none", "--out", "b.onnx", "--json")
    assert other.json["training"]["history"][0]["loss"] != done.json["training"]["history"][0]["loss"]
    torch.save(own(folder)["net"]().state_dict(), "dense.pt")
    ask = ("quantize", model, "--input", "2x8", "--pruned", "small", "--task", folder / "own.py")
    named = call(*ask, "--teacher", "dense.pt", "--epochs", "1", "--out", "c.onnx", "--json")
    assert named.code == 0, named.err
    assert Path("c.onnx").read_bytes() == Path("a.onnx").read_bytes()
    # A run that trained its dense network itself has it among its steps; without that file it is not known.
    recipe = recipe.replace("own.py", "base.py")
    (tmp_path / "small" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    done = call("quantize", "small", "--epochs", "1", "--out", "e.onnx", "--json")
    assert done.json["training"]["teacher"] == "itself in float"
    (tmp_path / "small" / "steps").mkdir()
    save_file(own(folder)["net"]().state_dict(), tmp_path / "small" / "steps" / "base-trained.safetensors")
    done = call("quantize", "small", "--epochs", "1", "--out", "f.onnx", "--json")
    assert done.json["training"]["teacher"] == "dense"
    assert Path("f.onnx").read_bytes() == Path("a.onnx").read_bytes() != Path("e.onnx").read_bytes()
    done = call("quantize", "small", "--task", folder / "own.py", "--out", "d.onnx")
    assert (done.code, "--task must be left out" in done.err) == (2, True), done.err


def test_masks_survive_the_training(call, folder):
    model = f"{folder / 'own.py'}:net"
    ask = ("--input", "2x8", "--granularity", "element", "--density", "0.5", "--out", "masked")
    assert call("prune", model, *ask).code == 0
    ask = ("quantize", model, "--input", "2x8", "--pruned", "masked", "--task", folder / "own.py", "--scheme", "w4a4")
    assert call(*ask, "--epochs", "1", "--out", "a.safetensors").code == 0
    weights = load_packed("a.safetensors")
    total = sum(w.codes.numel() for w in weights.values())
    assert sum(int((w.codes == 0).sum()) for w in weights.values()) >= total // 2


def test_calibration_of_another_range_than_the_evaluation_is_told(call, asked, folder):
    x = torch.cat(own(folder)["calibration_batches"]()).numpy()
    for name, scale, odd in (("a", 1.0, False), ("b", 255.0, True)):
        np.save("x.npy", x * np.float32(scale))
        done = call(*asked, "--calibrate", "x.npy", "--out", f"{name}.onnx", "--json")
        assert done.code == 0, done.err
        assert done.json["calibrated_on"] == "given"
        assert any("calibration inputs lie in" in n and "evaluate gives in" in n for n in done.json["notes"]) == odd


def test_fault_51_samples_that_are_not_finite_are_counted_and_left_out(call, asked, folder):
    x = torch.cat(own(folder)["calibration_batches"]()).numpy()
    x[[3, 40]] = np.nan
    np.save("x.npy", x)
    done = call(*asked, "--calibrate", "x.npy", "--out", "a.onnx", "--json")
    assert done.code == 0, done.err
    assert "calibration: 2 samples with NaN or infinity were left out" in done.json["notes"]
    x[:] = np.nan
    np.save("x.npy", x)
    done = call(*asked, "--calibrate", "x.npy", "--out", "b.onnx")
    assert (done.code, "Got 64 samples, all with NaN or infinity" in done.err) == (3, True), done.err


def test_a_layer_of_zeros_is_flagged_and_not_trained(call, asked, folder):
    network = own(folder)["net"]()
    with torch.no_grad():
        network[2].weight.zero_()
    torch.save(network.state_dict(), "zeros.pt")
    done = call(*asked, "--weights", "zeros.pt", "--out", "a.onnx", "--json")
    assert done.code == 0, done.err
    assert any(n.startswith("zeros: all weights of 2.weight") for n in done.json["notes"])
    done = call(*asked, "--weights", "zeros.pt", "--epochs", "1", "--out", "b.onnx")
    assert (done.code, "Got only 0 in 2.weight" in done.err) == (3, True), done.err
    assert not Path("b.onnx").exists()


def test_the_memory_of_repairs_is_told(call, asked):
    done = call(*asked, "--repair", "gptq", "--repair", "bias", "--out", "a.onnx", "--json")
    assert done.code == 0, done.err
    assert any(n.startswith("memory: some ") and n.endswith("(estimated)") for n in done.json["notes"])
