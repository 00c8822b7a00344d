"""Files of one layer against PyTorch, what the runtimes make of them, and the cache of their times."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.nn import functional as F

from paredown.errors import MissingError, UsageError
from paredown.export.openvino_session import Session
from paredown.export.session import open_session
from paredown.measure import layer_tables
from paredown.measure.layer_files import LayerShape, feed_for, write_layer
from paredown.measure.layer_tables import Setting, _version, cached, layer_times


def conv(out_channels=8, in_channels=8, groups=1, stride=1, positions=(7, 6)):
    return LayerShape(
        kind="conv", out_channels=out_channels, in_channels=in_channels, positions=positions, kernel=(3, 3),
        stride=(stride, stride), padding=(1, 1), dilation=(1, 1), groups=groups,
    )  # fmt: skip


LINEAR = LayerShape(kind="linear", out_channels=5, in_channels=12, positions=(3,))
SHAPES = [conv(), conv(16, 8, stride=2), conv(8, 8, groups=8), conv(8, 4, groups=2), LINEAR]


def weights(path):
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_float_layer_computes_what_torch_does(shape, tmp_path):
    path = write_layer(shape, tmp_path / "layer.onnx")
    held, feed = {n: torch.tensor(v) for n, v in weights(path).items()}, feed_for(shape, "fp32")
    x = torch.tensor(feed["x"])
    if shape.kind == "linear":
        wanted = F.linear(x, held["w"], held["b"])
    else:
        wanted = F.conv2d(x, held["w"], held["b"], stride=shape.stride, padding=shape.padding, groups=shape.groups)
    (got,) = open_session(path).run(None, feed)
    assert got.shape == tuple(wanted.shape)
    assert np.abs(got - wanted.numpy()).max() <= 1e-4 * np.abs(wanted.numpy()).max()
    (other,) = Session(path).run(None, feed)
    assert np.abs(other - wanted.numpy()).max() <= 1e-4 * np.abs(wanted.numpy()).max()
    assert shape.macs == wanted.numel() * held["w"][0].numel()


@pytest.mark.parametrize(
    ("shape", "op"), [(conv(), "QLinearConv"), (conv(8, 8, groups=8), "QLinearConv"), (LINEAR, "QGemm")]
)
def test_an_int8_layer_runs_in_the_integer_kernel_alone(shape, op, tmp_path):
    path = write_layer(shape, tmp_path / "layer.onnx", "int8")
    session = open_session(path, optimized=tmp_path / "optimized.onnx")
    ops = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert op in ops
    assert not {"QuantizeLinear", "DequantizeLinear", "Conv", "Gemm"} & set(ops)
    (got,) = session.run(None, feed_for(shape, "int8"))
    assert got.dtype == np.uint8
    assert len(np.unique(got)) > 3  # not clipped to one value


def test_shapes_that_cannot_be_are_refused(tmp_path):
    for wrong in ({"groups": 3}, {"out_channels": 0}, {"in_channels": -8}):
        with pytest.raises(UsageError, match="that its groups divide"):
            conv(**wrong)
    with pytest.raises(UsageError, match=r"scheme must be 'fp32' or 'int8'"):
        write_layer(conv(), tmp_path / "a.onnx", "int4")
    with pytest.raises(UsageError, match="run elsewhere"):
        Setting(target="litert")
    with pytest.raises(UsageError, match="threads must be"):
        Setting(threads=0)


@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-x86"])
def test_a_shape_is_timed_once_and_a_cut_cache_goes_on(target, tmp_path, monkeypatch):
    monkeypatch.setenv("PAREDOWN_LATENCY", str(tmp_path))
    setting = Setting(target=target)
    calls = []
    first = layer_times([[conv(8), conv(16)]], setting, progress=lambda known, total: calls.append((known, total)))
    assert calls == [(2, 2)]
    assert all(0 < t.value < 1000 and t.badge == "measured" and t.timing and t.n >= 5 for t in first.values())
    assert layer_times([[conv(8), conv(16)]], setting) == first

    (file,) = setting.folder.glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n" + lines[1][: len(lines[1]) // 2])  # killed while it wrote the second
    assert set(cached(setting)) == {conv(8)}
    again = layer_times([[conv(8), conv(16)]], setting)
    assert again[conv(8)] == first[conv(8)]
    assert set(again) == {conv(8), conv(16)}
    assert layer_times([[conv(16)]], setting)[conv(16)] == again[conv(16)]  # what was measured anew was kept


@pytest.mark.parametrize("busy", [(), (0,), (1,), (0, 1), (1, 2), range(100)], ids=str)
def test_shapes_that_other_load_disturbed_are_timed_again(busy, tmp_path, monkeypatch):
    """The pulse shows it, a fifth slower; the shapes beside it take half longer. What is kept is what was timed in calm."""
    monkeypatch.setenv("PAREDOWN_LATENCY", str(tmp_path))
    taken = []

    def readings(sessions, feeds, **_):
        slowed = len(taken) in busy
        taken.append(slowed)
        usual = {name: 2.0 if name == "pulse" else 1.0 for name in sessions}
        return {n: [ms * (1 + slowed * (0.2 if n == "pulse" else 0.5))] * 5 for n, ms in usual.items()}, {}

    monkeypatch.setattr(layer_tables, "readings", readings)
    found = layer_times([[conv(8)], [conv(16)], [conv(24)]], Setting())
    calm = 1.5 if busy == range(100) else 1.0  # always the same load is no disturbance
    assert {t.value for t in found.values()} == {t.value for t in cached(Setting()).values()} == {calm}
    assert len(taken) == 3 + (0 if busy == range(100) else len(busy))


def test_times_that_cannot_be_right_are_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PAREDOWN_LATENCY", str(tmp_path))
    setting = Setting()
    layer_times([[conv(8)]], setting)
    (file,) = setting.folder.glob("*.jsonl")
    good = json.loads(file.read_text())
    for value in (-1.0, 0.0, 1e300, "fast"):
        wrong = json.loads(json.dumps(good))
        wrong["measured"]["latency_ms"]["value"] = value
        file.write_text(json.dumps(wrong) + "\n")
        assert cached(setting) == {}
    file.write_text("not json\n")
    assert cached(setting) == {}
    file.write_text('{"cell": {"la\n[]\n' + json.dumps(good) + "\n")  # two runs of one process number
    assert set(cached(setting)) == {conv(8)}


def test_a_runtime_of_another_package_has_the_version_of_its_module():
    """As onnxruntime has, where onnxruntime-gpu is installed: json stands for a module without a package of its name."""
    assert _version("json") == json.__version__
    with pytest.raises(MissingError, match="pip install no_such_runtime"):
        _version("no_such_runtime")


def test_one_setting_says_nothing_of_another(tmp_path, monkeypatch):
    monkeypatch.setenv("PAREDOWN_LATENCY", str(tmp_path))
    settings = [Setting(), Setting(threads=2), Setting(scheme="int8"), Setting(target="openvino-x86")]
    assert len({s.folder for s in settings}) == 4
    layer_times([[conv(8)]], settings[0])
    assert [len(cached(s)) for s in settings] == [1, 0, 0, 0]
    described = json.loads((settings[0].folder / "setting.json").read_text())
    assert {"cpu", "runtime", "version", "threads", "dtype"} <= set(described)
