"""A bundle runs by itself, and its results are believed only as far as they can be worked out again."""

from __future__ import annotations

import base64
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bundle_case import sealed, started

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
from onnx import numpy_helper

from paredown.errors import RejectedError, UsageError, VerificationError
from paredown.export import Artifact, export
from paredown.measure import Bundle, Tolerance, bundle, import_results, read_bundle
from paredown.measure.bundle import default_tolerance
from paredown.measure.bundled.runner import disturbed, drift


class Two(nn.Module):
    """Two inputs, one of them whole numbers, and two named outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.table = nn.Conv2d(3, 8, 3), nn.Embedding(7, 8)

    def forward(self, image: torch.Tensor, kind: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.a(image).relu().mean((2, 3)) + self.table(kind)
        return {"logits": pooled, "norm": pooled.square().sum(1)}


@pytest.fixture(scope="module")
def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    dice = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 3, 9, 9, generator=dice), torch.arange(3) + i) for i in range(4)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, samples: Any) -> Artifact:
    return export((Two(), samples[0]), tmp_path_factory.mktemp("model") / "odd name's.onnx")


@pytest.fixture(scope="module")
def made(artifact: Artifact, samples: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("out") / "a bundle"
    return bundle(artifact, samples, out=out, num_golden=5, preprocessing={"mean": [0.5], "layout": "NCHW"})


@pytest.fixture(scope="module")
def results(made: Bundle) -> dict[str, Any]:
    """What the runner wrote, in a process of its own, which has nothing of paredown."""
    quick = ("--seconds", "0.5", "--readings", "40", "--pause", "0")
    done = started([made.folder / "run_local.sh", *quick], made.folder)
    assert done.returncode == 0, done.stderr
    assert "median" in done.stdout
    return json.loads((made.folder / "results.json").read_text())  # type: ignore[no-any-return]


def test_the_folder_is_what_the_manifest_says(made: Bundle, artifact: Artifact, samples: Any) -> None:
    manifest = json.loads((made.folder / "manifest.json").read_text())
    every = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert every - {"manifest.json", "results.json"} == set(manifest["files"])
    assert (made.folder / "model.onnx").read_bytes() == artifact.path.read_bytes()
    assert manifest["preprocessing"] == {"mean": [0.5], "layout": "NCHW"}
    assert manifest["requires"] == {"ir_version": 8, "opsets": {"ai.onnx": 18}}
    assert [i["name"] for i in manifest["inputs"]] == ["image", "kind"]
    assert [o["name"] for o in manifest["outputs"]] == ["logits", "norm"]
    assert made.num_golden == 5
    # Sample 4 is the second of the second batch. Its bytes are little-endian and in C order.
    image = np.frombuffer((made.folder / "golden/4/input_0.bin").read_bytes(), "<f4").reshape(1, 3, 9, 9)
    assert (image == samples[1][0][1:2].numpy()).all()
    with torch.no_grad():
        expected = Two()(samples[1][0][1:2], samples[1][1][1:2])
    logits = np.frombuffer((made.folder / "golden/4/output_0.bin").read_bytes(), "<f4")
    assert np.abs(logits - expected["logits"].numpy().ravel()).max() < 1e-5
    tensor = onnx.TensorProto.FromString((made.folder / "test_data_set_4/output_1.pb").read_bytes())
    assert tensor.name == "norm" and np.allclose(numpy_helper.to_array(tensor), expected["norm"].numpy(), rtol=1e-4)
    assert all((made.folder / s).stat().st_mode & 0o111 for s in ("run_local.sh", "run_ssh.sh", "run_adb.sh"))


def test_preprocessing_that_is_not_given_is_called_so(artifact: Artifact, samples: Any, tmp_path: Path) -> None:
    plain = bundle(artifact, samples, out=tmp_path / "b", num_golden=1)
    assert plain.manifest["preprocessing"] == "not given"
    assert plain.tolerance == Tolerance(max_error_of_scale=1e-4)
    assert default_tolerance("int8") == Tolerance(cosine=0.999)


class Steep(nn.Module):
    """Layers that multiply small differences: one step of rounding in front is many behind."""

    def __init__(self, depth: int, std: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize(("depth", "std", "amplifies"), [(10, 0.5, True), (2, 0.1, False)])
def test_golden_outputs_of_a_lone_file_are_held_to_what_it_is_from_itself(
    depth: int, std: float, amplifies: bool, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    from paredown.export.conditioning import own_cosine
    from paredown.program import capture
    from paredown.quantize import quantize

    torch.manual_seed(0)
    x = torch.randn(64, 64)
    simulation = quantize(capture(Steep(depth, std), x[:2]), calibrate=[x])
    found = bundle(export(simulation, tmp_path / "net.onnx"), [x[:6]], out=tmp_path / "b", num_golden=6)
    own = min(own_cosine(simulation, ((row[None],), {})) for row in x[:6])  # the same of the simulation
    asked = found.tolerance.cosine or 0.0
    assert (own < 0.9995, asked < 0.999) == (amplifies, amplifies)
    assert 0.98 <= asked <= 0.999
    assert ("amplifies rounding" in found.manifest.get("tolerance_because", "")) == amplifies


def test_results_become_a_record_of_the_device(made: Bundle, results: dict[str, Any]) -> None:
    record = import_results(made.folder / "results.json", made.folder)
    latency, error = record.measured["latency_ms"], record.measured["golden_max_error"]
    used = next(s for s in record.details["series"] if s["used"])
    assert latency.badge == "measured" and latency.timing and latency.n == used["n"]
    assert latency.value == used["median_ms"]
    assert 0 < latency.low <= latency.value <= latency.high
    assert error.badge == "measured" and error.n == 5
    assert record.details["golden"]["holds"] and record.details["golden"]["scale"] > 0.1
    assert results["device"]["cpu"] in latency.machine and "ONNX Runtime" in latency.protocol
    assert record.cell["stage"].startswith("device-")
    assert record == type(record).from_json(record.to_json())


def test_a_model_file_alone_holds_the_hash_and_leaves_the_outputs_untested(
    made: Bundle, results: dict[str, Any], artifact: Artifact
) -> None:
    record = import_results(made.folder / "results.json", artifact.path)
    assert set(record.measured) == {"latency_ms"}
    assert "outputs" in record.details["not_tested"][0]


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *way, last = path.split(".")
        place: Any = document
        for part in way:
            place = place[int(part) if part.isdigit() else part]
        key = int(last) if last.isdigit() else last
        if value is ...:
            del place[key]
        else:
            place[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("model", {"model.onnx": "0" * 64}), "must be of the model at"),
        (changed("series.0.latencies_ms.3", float("nan")), "NaN is no number"),
        (changed("series.0.latencies_ms.3", float("inf")), "Infinity is no number"),
        (changed("series.0.latencies_ms.3", -1.0), "greater than 0"),
        (changed("series.0.latencies_ms.3", 0.0), "greater than 0"),
        (changed("series.0.latencies_ms.3", "1.0"), "valid number"),
        (changed("series.0.latencies_ms", [1.0]), "at least 5"),
        (changed("series", []), "at least 1"),
        (changed("device", ...), "field required at 'device'"),
        (changed("outputs", ...), "field required at 'outputs'"),
        (changed("schema", 2), "schema 2; this paredown reads 1, a newer one"),
        (changed("extra", 1), "at 'extra'"),
        (changed("threads", True), "at 'threads'"),
        (changed("runtime.name", "litert"), "the bundle is for 'onnxruntime'"),
        (changed("outputs.0", []), "0 outputs of a sample"),
        (changed("outputs", []), "outputs of 0 samples"),
        (changed("outputs.0.0.shape", [1, 9]), "the golden one is float32"),
        (changed("outputs.0.0.dtype", "float64"), "the golden one is float32"),
        (changed("outputs.0.0.data", "AAAA"), "not the bytes of its shape"),
        (
            changed("outputs.0.0.data", base64.b64encode(np.full(8, np.nan, "<f4").tobytes()).decode()),
            "NaN or infinity",
        ),
        (changed("claimed.0.0", 0.25), "claimed errors that are not those of its outputs"),
    ],
)
def test_what_does_not_fit_is_refused(
    made: Bundle, results: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    document = copy.deepcopy(results)
    change(document)
    with pytest.raises(RejectedError, match=said) as caught:
        import_results(sealed(tmp_path / "results.json", document), made)
    assert caught.value.exit_code == 3


def test_an_edit_by_hand_is_seen(made: Bundle, results: dict[str, Any], tmp_path: Path) -> None:
    document = copy.deepcopy(results)
    document["series"][0]["latencies_ms"][0] *= 0.5
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    with pytest.raises(RejectedError, match="it was edited"):
        import_results(path, made)
    assert import_results(sealed(path, document), made).measured  # only the digest was wrong
    huge = json.dumps(document).replace(repr(document["series"][0]["latencies_ms"][1]), "1e999")
    path.write_text(huge)
    with pytest.raises(RejectedError, match=r"less than|finite"):
        import_results(path, made)
    for text in ("", "{", "[]", "null", '{"schema": 1, "schema": 1}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(RejectedError, match="must be what a bundle's runner wrote"):
            import_results(path, made)
    with pytest.raises(RejectedError, match="does not exist"):
        import_results(tmp_path / "none.json", made)


def test_parity_is_worked_out_again_from_the_outputs(made: Bundle, results: dict[str, Any], tmp_path: Path) -> None:
    """A device whose kernels are wrong, and that says so itself in `claimed`: not believed, found."""
    document = copy.deepcopy(results)
    one = document["outputs"][2][0]
    array = np.frombuffer(base64.b64decode(one["data"]), "<f4").copy()
    array[0] += 0.05
    one["data"] = base64.b64encode(array.tobytes()).decode()
    golden = np.frombuffer((made.folder / "golden/2/output_0.bin").read_bytes(), "<f4")
    document["claimed"][2][0] = float(np.abs(array.astype("f8") - golden.astype("f8")).max())
    path = sealed(tmp_path / "results.json", document)
    with pytest.raises(VerificationError, match="must be the golden ones") as caught:
        import_results(path, made)
    assert caught.value.exit_code == 6
    assert caught.value.evidence.measured["golden_max_error"].value == pytest.approx(0.05, rel=1e-3)
    loose = copy.deepcopy(json.loads((made.folder / "manifest.json").read_text()))
    loose["tolerance"] = {"max_error_of_scale": 0.9}
    folder = tmp_path / "loose"
    shutil.copytree(made.folder, folder)
    (folder / "manifest.json").write_text(json.dumps(loose))
    assert import_results(path, folder).details["golden"]["holds"]


def test_a_throttled_series_is_left_out_and_named(made: Bundle, results: dict[str, Any], tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    steady = (2.0 + 0.05 * dice.random(100)).tolist()
    hot = [t * (1 + 0.8 * i / 100) for i, t in enumerate(steady)]
    series = {"runs_per_reading": 1, "celsius": [41.0, 78.5], "megahertz": [1800.0, 1100.0]}
    document = copy.deepcopy(results)
    document["series"] = [{**series, "latencies_ms": hot}, {**series, "latencies_ms": steady}]
    record = import_results(sealed(tmp_path / "a.json", document), made)
    assert record.measured["latency_ms"].value == pytest.approx(np.median(steady))
    assert "unsteady" not in record.measured["latency_ms"].protocol
    assert any("series 1 of 2 drifts" in f and "left out" in f for f in record.details["flags"])
    assert any("clock fell from 1800 to 1100 MHz" in f for f in record.details["flags"])
    document["series"], document["throttled"] = [{**series, "latencies_ms": hot}], True
    record = import_results(sealed(tmp_path / "b.json", document), made)
    assert "unsteady" in record.measured["latency_ms"].protocol
    assert any("kept, since every series was disturbed" in f for f in record.details["flags"])
    assert any("says that it was throttled" in f for f in record.details["flags"])


def test_drift_is_told_from_noise() -> None:
    dice = np.random.default_rng(0)
    noise = dice.lognormal(0, 0.1, (60, 200))
    assert sum(drift(list(row)) > 1 for row in noise) <= 2
    ramp = 1 + 0.3 * np.arange(200) / 200
    step = np.where((np.arange(200) > 80) & (np.arange(200) < 130), 1.4, 1.0)
    for shape in (ramp, step, ramp[::-1]):
        assert all(drift(list(row * shape)) > 1.1 for row in noise[:10])
    assert disturbed([1.0] * 42 + [9.0] * 5 + [1.0] * 53) == ""  # a moment decides nothing
    assert "unsteady" in disturbed([1.0, 2.0] * 50)


def test_the_runner_refuses_a_damaged_bundle_and_a_runtime_that_is_too_old(made: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(made.folder, folder)
    data = (folder / "golden/0/input_0.bin").read_bytes()
    (folder / "golden/0/input_0.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    done = started([folder / "run_local.sh"], folder)
    assert (done.returncode, "golden/0/input_0.bin is missing or damaged" in done.stderr) == (3, True)
    with pytest.raises(RejectedError, match=r"golden/0/input_0\.bin"):
        read_bundle(folder)
    newer = onnx.load(made.folder / "model.onnx")
    newer.ir_version = 99
    new = tmp_path / "new"
    shutil.copytree(made.folder, new)
    (new / "results.json").unlink(missing_ok=True)
    onnx.save(newer, new / "model.onnx")
    manifest = json.loads((new / "manifest.json").read_text())
    from paredown.measure.bundled.runner import sha256

    manifest["files"]["model.onnx"] = sha256(new / "model.onnx")
    (new / "manifest.json").write_text(json.dumps(manifest))
    done = started([new / "run_local.sh"], new)
    assert done.returncode == 8
    assert "is older than the model" in done.stderr and "--opset" in done.stderr
    assert not (new / "results.json").exists()
    bare = started([made.folder / "run_local.sh"], made.folder, PYTHON="/nowhere/python3")
    assert (bare.returncode, "pip install numpy" in bare.stderr) == (8, True)


def test_wrong_requests_leave_nothing(artifact: Artifact, samples: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="num_golden"):
        bundle(artifact, samples, out=tmp_path / "b", num_golden=0)
    with pytest.raises(RejectedError, match="at least one sample"):
        bundle(artifact, [], out=tmp_path / "b")
    with pytest.raises(RejectedError, match="NaN or infinity in input image of sample 0"):
        bundle(artifact, [(torch.full((1, 3, 9, 9), torch.nan), torch.zeros(1, dtype=torch.long))], out=tmp_path / "b")
    with pytest.raises(UsageError, match="preprocessing must be text or JSON"):
        bundle(artifact, samples, out=tmp_path / "b", preprocessing={"f": object()})
    with pytest.raises(UsageError, match="must end in one of"):
        bundle(tmp_path / "model.pt", samples, out=tmp_path / "b")
    for wrong in (
        {},
        {"cosine": 2.0},
        {"cosine": 0.9, "max_error_of_scale": 0.1},
        {"max_error_of_scale": float("nan")},
    ):
        with pytest.raises(UsageError, match="a tolerance must be one number"):
            Tolerance(**wrong)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="which exists"):
        bundle(artifact, samples, out=tmp_path / "mine")
    with pytest.raises(UsageError, match="which is something else"):
        bundle(artifact, samples, out=tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_another_bundle_of_the_same_name_is_overwritten_on_request(
    artifact: Artifact, samples: Any, tmp_path: Path
) -> None:
    first = bundle(artifact, samples, out=tmp_path / "b", num_golden=3)
    assert bundle(artifact, samples, out=tmp_path / "b", num_golden=1, overwrite=True).num_golden == 1
    assert not (first.folder / "golden" / "1").exists()


def test_openvino_files_are_bundled_with_both_parts(samples: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    artifact = export((Two(), samples[0]), tmp_path / "net.xml", target="openvino-x86")
    made = bundle(artifact, samples, out=tmp_path / "b", num_golden=2)
    assert set(made.files) == {"model.xml", "model.bin"}
    assert made.manifest["requires"] == {"ir_version": 11}
    done = started([made.folder / "run_local.sh", "--seconds", "0.2", "--readings", "20", "--pause", "0"], made.folder)
    assert done.returncode == 0, done.stderr
    record = import_results(made.folder / "results.json", made)
    assert record.details["golden"]["holds"] and record.environment["runtime"]["name"] == "openvino"
    document = json.loads((made.folder / "results.json").read_text())
    document["model"]["model.bin"] = "f" * 64  # the weights are another model's
    with pytest.raises(RejectedError, match="must be of the model at"):
        import_results(sealed(tmp_path / "r.json", document), made)


@pytest.mark.parametrize("side", ["weights/w.bin", "net.bin"])
def test_side_files_of_an_onnx_file_stay_where_it_names_them(
    side: str, artifact: Artifact, samples: Any, tmp_path: Path
) -> None:
    model = onnx.load(artifact.path)
    (tmp_path / side).parent.mkdir(exist_ok=True)
    (tmp_path / "w.bin").write_bytes(b"another file's")
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location=side, size_threshold=256)
    made = bundle(tmp_path / "net.onnx", samples, out=tmp_path / "b", num_golden=1)
    assert set(made.files) == {"model.onnx", side}
    assert (made.folder / side).read_bytes() == (tmp_path / side).read_bytes()
    done = started([made.folder / "run_local.sh", "--seconds", "0.2", "--readings", "20", "--pause", "0"], made.folder)
    assert done.returncode == 0, done.stderr


class Boxes(nn.Module):
    """An image without boxes: an output with no element."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean((1, 2, 3)), x[:, :0, 0, :4]


def test_an_output_without_elements_is_no_edit(samples: Any, tmp_path: Path) -> None:
    images = [batch[0] if isinstance(batch, tuple | list) else batch for batch in samples]
    images = [i["args"][0] if isinstance(i, dict) else i for i in images]
    made = bundle(export((Boxes(), images[0]), tmp_path / "net.onnx"), images, out=tmp_path / "b", num_golden=2)
    done = started([made.folder / "run_local.sh", "--seconds", "0.2", "--readings", "20", "--pause", "0"], made.folder)
    assert done.returncode == 0, done.stderr
    assert import_results(made.folder / "results.json", made).details["golden"]["holds"]


def test_the_runner_is_a_file_of_its_own() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print([m for m in ('paredown', 'numpy', 'torch') if m in sys.modules])"
    from paredown.measure.bundled import runner

    done = subprocess.run([sys.executable, "-c", code, runner.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
