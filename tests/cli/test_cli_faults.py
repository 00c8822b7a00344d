"""Bad input on the command line: one message, the right exit code, nothing written (FAULTS 1, 2, 12–15, 17, 22, 27, 34, 35, 64–75, 83)."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import forked
from paredown.cli import main
from paredown.cli.main import explained
from paredown.cli.prune import DATA_FREE
from paredown.cli.show import plain
from paredown.errors import InfeasibleError, Interrupted, ParedownError
from paredown.models import load_model

INPUT = ("--input", "1x3x12x12")


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in str(p))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ""),
        (("frobnicate",), "frobnicate"),
        (("examine",), "MODEL"),
        (("examine", "x.py:f", "--inptu", "1"), "--inptu"),
        (("examine", "torch.nn:Identity"), "--input"),
        (("examine", "torch.nn:Identity", "--input", "1xx3"), "1xx3"),
        (("examine", "torch.nn:Identity", *INPUT, "--threads", "zero"), "zero"),
        (("examine", "torch.nn:Identity", *INPUT, "--threads", "0"), "--threads"),
        (("examine", "torch.nn:Identity", *INPUT, "--device", "cuda"), "compress"),
        (("examine", "torch.nn:Identity", *INPUT, "--target-size", "5 bananas"), "5 bananas"),
        (("couple", "not-a-model", *INPUT), "not-a-model"),
        (("measure", "x.onnx"), "--samples"),
        (("measure", "x.pt", *INPUT), ".onnx"),
        (("report", "nowhere"), "nowhere"),
        (("compress", "nowhere.yaml"), "nowhere.yaml"),
        (("compress", "digit"), "digits"),
        (("compress", "digits", "--set", "prune.critrion=l2"), "prune.criterion"),
        (("compress", "digits", "--set", "seed"), "key=value"),
        (("compress", "digits", "--device", "tpu"), "device"),
        (("compress", "digits", "--set", "device=cpu", "--device", "cuda"), "once"),
    ],
)
def test_usage_is_exit_2(call, arguments, says, tmp_path):
    done = call(*arguments)
    if not arguments:
        assert done.code == 0  # help
        return
    assert done.code == 2, done.err
    assert says in done.err
    assert done.out == ""
    assert files(tmp_path) == []


def test_with_json_an_error_is_the_document(call, nets, tmp_path):
    """What a script reads where the target cannot be met: the nearest plan, whole; stderr tells it as ever."""
    from paredown.plan import Plan

    asked = ("prune", f"{nets}:net", *INPUT, "--macs", "1000", "--out", "small")
    plain = call(*asked)
    assert plain.code == 4 and plain.out == ""
    done = call(*asked, "--json")
    assert (done.code, done.err) == (4, plain.err)
    told = done.json["error"]
    assert (done.json["schema"], told["kind"], told["exit_code"]) == (1, "InfeasibleError", 4)
    assert told["message"] in done.err and "macs" in told["message"]
    plan = Plan.from_json(json.dumps(told["nearest"]))
    assert plan.keep and plan.made_by["reached"]["macs"] > 1000
    for wrong, code, kind in (
        (("examine", "nowhere.py:net", *INPUT), 2, "UsageError"),
        (("examine", f"{nets}:failing", *INPUT), 3, "RejectedError"),
        (("examine", f"{nets}:net", *INPUT, "--inptu", "1"), 2, "UnknownOptionError"),
    ):
        done = call(*wrong, "--json")
        assert (done.code, done.json["error"]["exit_code"]) == (code, code), done.err
        assert done.json["error"]["kind"] == kind and done.json["error"]["nearest"] is None
        assert done.json["error"]["message"] in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(Interrupted("step 3 is kept"), 130), (ParedownError("odd"), 1), (InfeasibleError("too few"), 4)],
)
@pytest.mark.parametrize("before", [False, True])
def test_stdout_holds_one_document_whatever_ends_a_command(call, monkeypatch, error, code, before):
    from paredown.cli.show import emit

    def run(arguments):
        if before:
            emit({"schema": 1, "verdict": "told"})
        raise error

    monkeypatch.setattr(sys.modules[main.__module__], "_run", run)
    done = call("compress", "recipe.yaml", "--json")
    assert done.code == code
    if before:  # the command's own document, and the error on stderr alone
        assert done.json == {"schema": 1, "verdict": "told"}
    else:
        assert done.json["error"] | {"message": ""} == {
            "kind": type(error).__name__, "exit_code": code, "message": "", "nearest": None,
        }  # fmt: skip
    assert str(error) in done.err
    assert call("compress", "recipe.yaml").out == ("" if not before else '{\n "schema": 1,\n "verdict": "told"\n}\n')


def test_what_a_runtime_writes_beside_the_file_is_as_safe_as_the_file(tmp_path):
    from paredown.cli.quantize import check_out_file
    from paredown.errors import UsageError

    weights, out = tmp_path / "net.bin", tmp_path / "net.xml"
    weights.write_bytes(b"the user's")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="must not be the file of the weights"):
            check_out_file(out, {"weights": weights}, overwrite=overwrite)
    with pytest.raises(UsageError, match=r"no other file where its weights go.*net\.bin"):
        check_out_file(out, {}, overwrite=False)
    check_out_file(out, {}, overwrite=True)
    side = tmp_path / "net.onnx.data"
    side.write_bytes(b"another's")
    with pytest.raises(UsageError, match="must not be the file of the weights"):
        check_out_file(tmp_path / "net.onnx", {"weights": side}, overwrite=True)


def test_samples_are_cut_into_batches_of_the_length_that_a_network_fixes():
    import torch
    from torch import nn

    from paredown.cli.samples import as_batches
    from paredown.errors import RejectedError
    from paredown.program import capture

    samples = np.arange(7 * 6, dtype="f4").reshape(7, 6)
    fixed = capture(nn.Sequential(nn.Flatten(0), nn.Linear(12, 3)), torch.randn(2, 6))
    assert fixed.batch != "dynamic"
    found = [b["args"][0] for b in as_batches({"x": samples}, fixed, "--calibrate")]
    assert [len(x) for x in found] == [2, 2, 2] and torch.equal(torch.cat(found), torch.from_numpy(samples[:6]))
    with pytest.raises(RejectedError, match="at least one batch of 2"):
        as_batches({"x": samples[:1]}, fixed, "--calibrate")
    free = capture(nn.Linear(6, 2), torch.randn(2, 6))
    assert [len(b["args"][0]) for b in as_batches({"x": samples}, free, "--calibrate")] == [7]


@pytest.mark.parametrize("amount", ["0", "1", "1.0", "-0.1", "1.5", "25%", "half", "nan", "inf"])
def test_fault_67_one_rule_for_amounts(call, nets, amount):
    done = call("prune", f"{nets}:net", *INPUT, "--macs", amount, "--out", "small")
    assert done.code == 2
    assert "must be a float in (0, 1)" in done.err


@pytest.mark.parametrize("amount", ["0.5", "5e-1", "2100000"])
def test_fault_67_amounts_that_are_right(call, nets, amount):
    done = call(
        "prune", f"{nets}:net", *INPUT, "--parameters" if "." in amount else "--macs", amount, "--dry-run", "--json"
    )
    assert done.code == 0, done.err


def test_criteria_that_need_data_name_compress(call, nets):
    done = call("prune", f"{nets}:net", *INPUT, "--macs", "0.5", "--criterion", "taylor", "--out", "small")
    assert (done.code, "paredown compress" in done.err) == (2, True)
    done = call("prune", f"{nets}:net", *INPUT, "--macs", "0.5", "--criterion", "l3", "--out", "small")
    assert (done.code, ", ".join(DATA_FREE) in done.err) == (2, True)


def test_faults_1_and_2_models_that_are_not_there(call, nets, tmp_path):
    done = call("examine", f"{nets}:nett", *INPUT)
    assert done.code in (2, 3)
    assert "net" in done.err
    done = call("examine", str(nets).replace("nets.py", "netz.py:net"), *INPUT)
    assert done.code in (2, 3)
    assert "nets.py" in done.err
    done = call("examine", f"{nets}:net", *INPUT, "--weights", "w.pt")
    assert (done.code, "w.pt" in done.err) == (3, True)
    done = call("examine", f"{nets}:net", *INPUT, "--weights", tmp_path)
    assert (done.code, "folder" in done.err) == (3, True)
    done = call("examine", "missing.onnx")
    assert (done.code, "missing.onnx" in done.err) == (3, True)


def test_the_users_own_code_is_named(call, nets):
    done = call("examine", f"{nets}:failing", *INPUT)
    assert done.code == 3
    assert "no such thing" in done.err
    assert "nets.py" in done.err


@pytest.mark.parametrize("code", ["", "0", "'bye'"])
def test_code_of_ones_own_that_ends_the_process_is_no_success(call, tmp_path, code):
    (tmp_path / "ends.py").write_text(f"import sys\n\n\ndef net():\n    sys.exit({code})\n", encoding="utf-8")
    done = call("examine", f"{tmp_path / 'ends.py'}:net", *INPUT)
    assert (done.code, "ended the process with sys.exit" in done.err, "ends.py:5 in net" in done.err) == (
        3,
        True,
        True,
    ), done.err


def test_fault_46_inputs_that_do_not_fit(call, nets):
    done = call("examine", f"{nets}:net", "--input", "1x4x12x12")
    assert done.code == 3
    assert "4" in done.err


def test_strict_makes_unknown_ops_an_error(call, nets):
    for command in ("examine", "couple"):
        assert call(command, f"{nets}:Fft", *INPUT).code == 0
        done = call(command, f"{nets}:Fft", *INPUT, "--strict")
        assert done.code == 3
        assert "fft" in done.err


def test_fault_65_patterns(call, nets, tmp_path):
    done = call("prune", f"{nets}:net", *INPUT, "--macs", "0.5", "--exclude", "haed*", "--out", "small")
    assert (done.code, "haed*" in done.err) == (2, True)
    done = call("prune", f"{nets}:net", *INPUT, "--macs", "0.5", "--exclude", "*", "--out", "small")
    assert done.code == 4
    assert files(tmp_path) == []


def test_fault_66_precedence_is_printed(call, nets):
    done = call("prune", f"{nets}:net", *INPUT, "--channels", "0.5", "--include", "*", "--exclude", "0", "--dry-run")
    assert "exclude wins over include" in done.out


def test_fault_44_nothing_to_do(call, nets, tmp_path):
    done = call("prune", f"{nets}:nothing_free", *INPUT, "--macs", "0.5", "--out", "small")
    assert done.code == 4
    assert "output" in done.err
    assert files(tmp_path) == []


def test_fault_71_impossible_targets_print_the_nearest_plan(call, nets, tmp_path):
    done = call("prune", f"{nets}:net", *INPUT, "--parameters", "50", "--out", "small")
    assert done.code == 4
    assert "Nearest plan" in done.err
    assert "3.weight[0]" in done.err
    assert files(tmp_path) == []


def test_fault_72_a_target_that_is_met_changes_nothing(call, nets, tmp_path):
    done = call("prune", f"{nets}:net", *INPUT, "--macs", "999999999", "--out", "small")
    assert done.code == 0
    assert "already met" in done.out
    assert files(tmp_path) == []
    found = call("prune", f"{nets}:net", *INPUT, "--macs", "999999999", "--out", "small", "--json").json
    assert found["already_met"] is True
    assert found["parameters"][0] == found["parameters"][1]


def test_fault_73_folders_of_others(call, nets, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    ask = ("prune", f"{nets}:net", *INPUT, "--channels", "0.5", "--out")
    done = call(*ask, "full")
    assert (done.code, "--overwrite" in done.err) == (2, True)
    assert call(*ask, "full", "--overwrite").code == 0
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    assert call(*ask, nets.parent, "--overwrite").code == 2  # the model's own folder
    (tmp_path / "file").write_text("")
    assert call(*ask, "file").code == 2


def test_fault_73_files_that_are_read_are_not_written(call, nets, tmp_path):
    from safetensors.torch import save_file

    save_file(runpy.run_path(str(nets))["net"]().state_dict(), tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    done = call("export", f"{nets}:net", *INPUT, "--weights", "w.safetensors", "--out", "w.safetensors", "--overwrite")
    assert done.code == 2
    assert (tmp_path / "w.safetensors").read_bytes() == before
    (tmp_path / "there.onnx").write_text("mine")
    assert call("export", f"{nets}:net", *INPUT, "--out", "there.onnx").code == 2
    assert (tmp_path / "there.onnx").read_text() == "mine"
    assert call("prune", f"{nets}:net", *INPUT, "--weights", "w.safetensors", "--macs", "0.5", "--out", ".").code == 2


@pytest.mark.parametrize("name", ["a folder", "größe 模型", "new\nline", "50% [red]x", "'quoted' \"$(id)\"", "n" * 200])
def test_fault_74_odd_paths(call, nets, tmp_path, name):
    done = call("prune", f"{nets}:net", *INPUT, "--channels", "0.5", "--out", name, "--json")
    assert done.code == 0, done.err
    assert done.json["out"] == name
    assert files(tmp_path) == sorted([name, *(f"{name}/{f}" for f in ("form.json", "model.safetensors", "plan.json"))])


def test_fault_74_names_that_begin_with_a_dash(call, tmp_path):
    done = call("report", "--", "-rf")
    assert (done.code, "-rf" in done.err) == (2, True)
    assert call("examine", "--", "-rf").code == 2


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_fault_74_names_that_no_file_can_have(call, nets, name):
    for arguments in (
        ("report", name),
        ("compress", name),
        ("examine", f"{name}.onnx"),
        ("examine", f"{nets}:net", *INPUT, "--weights", name),
        ("prune", f"{nets}:net", *INPUT, "--channels", "0.5", "--out", name),
        ("export", f"{nets}:net", *INPUT, "--out", name),
        ("quantize", f"{nets}:net", *INPUT, "--calibrate", name, "--out", "q.onnx"),
        ("init", name),
    ):
        done = call(*arguments)
        assert done.code in (2, 3, 7), (arguments[0], done.err)


def test_fault_75_odd_layer_names_are_shown_as_they_are(call, nets):
    done = call("examine", f"{nets}:odd_names", *INPUT)
    assert done.code == 0
    assert "<script>alert(1)</script>" in done.out
    assert "[red]%s{0}[/red]" in done.out
    assert "\x1b[31m" not in done.out
    done = call("prune", f"{nets}:odd_names", *INPUT, "--channels", "0.5", "--out", "small")
    assert done.code == 0, done.err
    assert "[red]%s{0}[/red].weight[0]" in done.out
    assert "\x1b[31m" not in done.out + done.err


def test_fault_83_folders_that_cannot_be_written(call, nets, tmp_path):
    (tmp_path / "file").write_text("")
    done = call("prune", f"{nets}:net", *INPUT, "--channels", "0.5", "--out", "file/below")
    assert done.code == 7, done.err
    assert "file/below" in done.err
    assert call("init", "file/below").code == 7


def test_calibration_data_of_the_wrong_kind(call, nets, tmp_path):
    ask = ("quantize", f"{nets}:net", *INPUT, "--out", "q.onnx", "--calibrate")
    np.savez("bytes.npz", x=np.zeros((4, 3, 12, 12), np.uint8))
    np.savez("shape.npz", x=np.zeros((4, 3, 8, 12), np.float32))
    np.savez("two.npz", x=np.zeros((4, 3, 12, 12), np.float32), y=np.zeros((4, 1), np.float32))
    np.savez("empty.npz", x=np.zeros((0, 3, 12, 12), np.float32))
    np.savez("objects.npz", x=np.array([{"a": 1}], dtype=object))
    Path("random.npz").write_bytes(b"\x00\x01not an archive")
    np.savez_compressed("whole.npz", x=np.random.default_rng(0).normal(size=(4, 3, 12, 12)).astype(np.float32))
    whole = Path("whole.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[: len(whole) // 2])
    Path("flipped.npz").write_bytes(whole[:200] + b"\xff" * 50 + whole[250:])
    at = whole.index(b"PK\x01\x02")  # the entry of the directory: flags, then the kind of compression
    Path("encrypted.npz").write_bytes(whole[: at + 8] + b"\x01" + whole[at + 9 :])
    Path("packed.npz").write_bytes(whole[: at + 10] + b"\x63" + whole[at + 11 :])
    for name, says in (
        ("bytes.npz", "floats"),
        ("shape.npz", "(3, 12, 12)"),
        ("two.npz", "one array"),
        ("empty.npz", "at least one sample"),
        ("objects.npz", "pickle"),
        ("random.npz", "pickle"),
        ("cut.npz", "a whole .npz"),
        ("flipped.npz", "a whole .npz"),
        ("encrypted.npz", "a whole .npz"),
        ("packed.npz", "a whole .npz"),
        ("missing.npz", "missing.npz"),
    ):
        done = call(*ask, name)
        assert (done.code, says in done.err) == (3, True), (name, done.err)
    assert not Path("q.onnx").exists()


def test_fault_16_samples_that_unpack_to_more_than_there_is_memory_for(call, nets, tmp_path, monkeypatch):
    """The size that the archive declares is looked at before anything is unpacked; so is the number of its entries."""
    np.savez_compressed("bomb.npz", x=np.zeros((4000, 3, 12, 12), np.float32))
    assert Path("bomb.npz").stat().st_size < 20_000
    with zipfile.ZipFile("many.npz", "w") as archive:
        for number in range(1001):
            archive.writestr(f"{number}.npy", b"")
    monkeypatch.setattr("paredown.machine_memory.available_bytes", lambda: 10_000_000)
    monkeypatch.setattr("numpy.load", lambda *args, **kwargs: pytest.fail("it was unpacked"))
    ask = ("quantize", f"{nets}:net", *INPUT, "--out", "q.onnx", "--calibrate")
    done = call(*ask, "bomb.npz")
    assert (done.code, "must fit in memory" in done.err, "bomb.npz" in done.err) == (7, True, True), done.err
    assert "6,912,1" in done.err  # bytes: 4 × 4000 × 3 × 12 × 12 and a header
    done = call(*ask, "many.npz")
    assert (done.code, "at most 1,000 arrays" in done.err) == (3, True), done.err
    assert not Path("q.onnx").exists()


def test_a_pickle_in_an_array_is_never_run(call, nets, tmp_path):
    canary = tmp_path / "canary"
    np.save("evil.npy", np.array([_Evil(str(canary))], dtype=object), allow_pickle=True)
    assert call("quantize", f"{nets}:net", *INPUT, "--out", "q.onnx", "--calibrate", "evil.npy").code == 3
    assert not canary.exists()


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_damaged_run_is_named(call, tmp_path):
    (tmp_path / "run").mkdir()
    assert call("report", "run").code == 2
    (tmp_path / "run/records.jsonl").write_text('{"cell": \n')
    for extra in ((), ("--json",)):
        done = call("report", "run", *extra)
        assert done.code == 3, done.err
        assert "records.jsonl" in done.err


def onnx_file(folder: Path, name: str, location: str | None = None, **told: object) -> Path:
    """y = x · w; `w` lies in the file, or where `location` says."""
    onnx = pytest.importorskip("onnx")
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4, 4], b"\0" * 64, raw=True)
    if location is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, **told}.items():
            tensor.external_data.add(key=key, value=str(value))
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    opset = [onnx.helper.make_opsetid("", 18)]
    (folder / name).write_bytes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    return folder / name


def both(call, path):
    """examine reads the file, measure would run it."""
    return [call("examine", path), call("measure", path, "--input", "1x4", "--runs", "5", "--seconds", "0.1")]


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "../secret.bin", "way/secret.bin"])
def test_fault_12_side_files_outside_are_never_read(call, tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 64)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/way").symlink_to("..")
    for done in both(call, onnx_file(tmp_path / "m", "a.onnx", location)):
        assert (done.code, "beside it" in done.err, done.out) == (3, True, "")


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
def test_fault_13_side_files_that_are_links(call, tmp_path, kind):
    """A copy of the same file is fine: what is there belongs to the model alone."""
    (tmp_path / "real.bin").write_bytes(b"\0" * 64)
    link, folder = tmp_path / "m/w.bin", tmp_path / "m"
    folder.mkdir()
    _ = link.symlink_to(tmp_path / "real.bin") if kind == "symlink" else link.hardlink_to(tmp_path / "real.bin")
    path = onnx_file(folder, "a.onnx", "w.bin")
    for done in both(call, path):
        assert (done.code, "side files" in done.err, done.out) == (3, True, "")
    link.unlink()
    link.write_bytes((tmp_path / "real.bin").read_bytes())
    assert [done.code for done in both(call, path)] == [0, 0]


def test_fault_14_declared_sizes_never_reach_the_memory(call, tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    for told in ({"length": 2**62}, {"offset": -4}):
        for done in both(call, onnx_file(tmp_path, "a.onnx", "w.bin", **told)):
            assert (done.code, "inside its side file" in done.err) == (3, True)
    model = onnx.load_model(str(onnx_file(tmp_path, "b.onnx")))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40
    (tmp_path / "b.onnx").write_bytes(model.SerializeToString())
    for done in both(call, tmp_path / "b.onnx"):
        assert (done.code, "elements" in done.err) == (7, True), done.err


def test_fault_15_circles_and_foreign_ops(call, tmp_path):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in "xy"]
    nodes = [
        helper.make_node("Add", ["b", "x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Magic", ["b"], ["y"], domain="acme"),
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    (tmp_path / "a.onnx").write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    listed, ran = both(call, tmp_path / "a.onnx")
    assert (listed.code, "acme::Magic" in listed.out) == (0, True)
    assert (ran.code, "a.onnx" in ran.err) == (3, True)


def test_fault_17_weights_that_change_while_they_are_read(call, nets, tmp_path, monkeypatch):
    """The file is written to between its header and its data, as by a training that still runs."""
    from safetensors.torch import save_file

    from paredown import weights

    path = tmp_path / "w.safetensors"
    save_file(runpy.run_path(str(nets))["net"]().state_dict(), path)
    places = weights._places

    def meanwhile(*arguments, **named):
        path.write_bytes(path.read_bytes() + b"\0" * 8)
        return places(*arguments, **named)

    monkeypatch.setattr(weights, "_places", meanwhile)
    done = call("prune", f"{nets}:net", *INPUT, "--weights", path, "--channels", "0.5", "--out", "small")
    assert (done.code, "must not change while" in done.err) == (3, True), done.err
    assert not (tmp_path / "small").exists()


ODD = """
import torch
from torch import nn


def quantized():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), {nn.Linear})


def equal():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    for p in net.parameters():
        nn.init.ones_(p)
    return net


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.cell, self.down = nn.Linear(6, 12), nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.down(self.cell(self.up(x).relu())[0])


def transposed():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 12, 2, stride=2), nn.Conv2d(12, 4, 1))


@torch.library.custom_op("faults::flip", mutates_args=())
def flip(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).clone()


@flip.register_fake
def _(x):
    return torch.empty_like(x)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.c(self.b(flip(self.a(x)).relu()).relu())


class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 10, 16))
        self.block = nn.TransformerEncoderLayer(16, 4, dim_feedforward=24, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.block(x)[:, 0])
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "odd.py"
    path.write_text(ODD, encoding="utf-8")
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [("--channels", "0.5"), ("--granularity", "2:4")])
def test_fault_22_a_quantized_model_is_not_pruned(call, odd, tmp_path, options):
    done = call("prune", f"{odd}:quantized", "--input", "2x4", *options, "--out", "small")
    assert (done.code, "quantized layers" in done.err) == (3, True), done.err
    assert not (tmp_path / "small").exists()


def test_fault_27_equal_scores_leave_from_the_lowest_index(call, odd, tmp_path):
    for name in ("one", "two"):
        ask = ("--channels", "0.5", "--align", "1", "--out", name)
        assert call("prune", f"{odd}:equal", *INPUT, *ask).code == 0
    plan = json.loads((tmp_path / "one/plan.json").read_text())
    assert plan["keep"]["0.weight"]["0"] == list(range(8, 16))
    for file in ("plan.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    from safetensors.numpy import load_file

    ask = ("--granularity", "element", "--density", "0.5", "--out", "masked")
    assert call("prune", f"{odd}:equal", *INPUT, *ask).code == 0
    kept = load_file(tmp_path / "masked/model.safetensors")["0.weight"].ravel() != 0
    assert kept.tolist() == [False] * 216 + [True] * 216


@pytest.mark.parametrize(
    ("name", "shape", "smaller"),
    [
        ("Recurrent", "2x5x6", "up.weight"),
        ("transposed", "1x3x12x12", "2.weight"),
        ("Custom", "1x3x12x12", "b.weight"),
    ],
)
def test_fault_34_pruned_right_or_protected(call, odd, tmp_path, name, shape, smaller):
    from safetensors.numpy import load_file

    ask = ("prune", f"{odd}:{name}", "--input", shape, "--channels", "0.5", "--align", "1")
    done = call(*ask, "--out", "small", "--json")
    assert done.code == 0, done.err
    found = done.json
    dense = load_model(f"{odd}:{name}")[
        0
    ].state_dict()  # run the file once more by another way, and its op is a new one
    assert found["proof"]["max_error"] <= 1e-4 * found["proof"]["scale"] and found["proof"]["moved"] > 0
    small = load_file(tmp_path / "small/model.safetensors")
    assert small[smaller].size < dense[smaller].numel()
    if name == "Custom":  # what reaches the op stays, and it is said
        assert small["a.weight"].shape == tuple(dense["a.weight"].shape)
        assert any("faults.flip" in n and "stay" in n for n in found["notes"])
        assert sum(found["unknown_ops"].values()) == 1
        strict = call(*ask, "--strict", "--out", "strict")
        assert (strict.code, "faults.flip" in "".join(strict.err.split())) == (3, True)  # wherever the line breaks
        assert not (tmp_path / "strict").exists()


def test_fault_35_a_vision_transformer_keeps_its_stream(call, odd, tmp_path):
    from safetensors.numpy import load_file

    ask = ("--granularity", "head", "--channels", "0.5", "--align", "1", "--out", "small", "--json")
    done = call("prune", f"{odd}:Vit", "--input", "1x3x12x12", *ask)
    assert done.code == 0, done.err
    found, small = done.json, load_file(tmp_path / "small/model.safetensors")
    assert found["proof"]["max_error"] <= 1e-4 * found["proof"]["scale"] and found["proof"]["moved"] > 0
    shapes = sorted(a.shape for a in small.values() if a.ndim == 2)
    assert (24, 16) in shapes and (16, 8) in shapes  # q, k and v of two of four heads, and what reads them
    assert {(1, 1, 16), (1, 10, 16)} <= {a.shape for a in small.values()}  # class token and positions are whole


# ------------------------------------------------------------------------------------------------- what main makes of it


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 7, "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
            7,
            "out of memory",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 7, "out of memory"),
        (OSError(28, "No space left on device", "/x"), 7, "out of space"),
        (PermissionError(13, "Permission denied", "/x"), 7, "no permission"),
        (ModuleNotFoundError("No module named 'torch'"), 8, "doctor"),
        (ZeroDivisionError("division by zero"), 1, "please report"),
    ],
)
def test_every_failure_has_a_code(error, code, says):
    message, found = explained(error)
    assert found == code
    assert says in message


def test_exit_codes_are_those_of_the_tree():
    from paredown import errors

    seen = {}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, ParedownError) and kind is not ParedownError:
            seen[kind.__name__] = explained(kind("a message"))[1]
    assert seen == {
        "UsageError": 2, "RejectedError": 3, "CaptureError": 3, "InfeasibleError": 4, "NothingToDo": 4, "GateError": 5,
        "VerificationError": 6, "ResourceError": 7, "MissingError": 8,
    }  # fmt: skip
    assert Interrupted.exit_code == 130
    assert explained(InfeasibleError("a message", nearest=None)) == ("a message", 4)


def test_real_memory_exhaustion_is_exit_7(call, tmp_path):
    """8 TB of weights: the allocator refuses, nothing is killed."""
    (tmp_path / "big.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(10**6, 2 * 10**6)\n")
    done = call("examine", "big.py:net", "--input", "1x3")
    assert done.code in (3, 7), done.err
    assert "allocate" in done.err


def test_control_characters_are_shown():
    assert plain("a\x1b[31mb\x00\u202ec\nd🙂") == "a\\x1b[31mb\\x00\\u202ec\nd🙂"


def test_a_reader_that_goes_away_is_no_fault(nets):
    command = f"{sys.executable} -m paredown examine {nets}:net --input 1x3x12x12 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""


def test_terminals_that_know_few_characters(nets):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "paredown", "examine", f"{nets}:net", "--input", "1x3x12x12"]
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith(b"note")) <= 40


def test_debug_shows_the_traceback(nets):
    done = forked.run(forked.PAREDOWN, "examine", f"{nets}:failing", *INPUT, env={"PAREDOWN_DEBUG": "1"})
    assert done.returncode == 3
    assert "Traceback" in done.stderr
