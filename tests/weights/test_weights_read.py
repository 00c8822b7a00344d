from __future__ import annotations

import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paredown import weights as weights_module
from paredown import weights_process
from paredown.errors import RejectedError
from paredown.weights import read_weights


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def state():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(first: int, last: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape or [(last - first) // 4], "data_offsets": [first, last]}


def test_three_formats_give_the_same_tensors(tmp_path, state):
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "named.anything")
    assert len(state) == 7
    for name in ("zip.pt", "legacy.pth", "named.anything"):
        assert same(read_weights(tmp_path / name), dict(state)), name


def test_fault_21_dtypes_are_kept_and_said(tmp_path):
    dtypes = {"a": torch.float16, "b": torch.bfloat16, "c": torch.float64}
    torch.save({n: torch.ones(3, dtype=d) for n, d in dtypes.items()}, tmp_path / "mixed.pt")
    found = read_weights(tmp_path / "mixed.pt")
    assert {n: t.dtype for n, t in found.items()} == dtypes
    assert found.notes == ("dtypes kept: 1 × bfloat16, 1 × float16, 1 × float64",)


def test_a_checkpoint_gives_its_state_dict_and_says_so(tmp_path, state):
    torch.save({"epoch": 3, "model": state, "optimizer": {"lr": 0.1}}, tmp_path / "c.pt")
    found = read_weights(tmp_path / "c.pt")
    assert same(found, dict(state))
    assert found.kind == "state_dict"
    assert found.notes[0] == "unwrapped 'model' of the checkpoint; beside it, not read: epoch, optimizer"
    with pytest.raises(weights_process.Refused, match="which of them"):
        weights_process._unwrapped({"generator": state, "critic": state})
    assert same(weights_process._unwrapped({"generator": state, "epoch": 1})[0], dict(state))


def test_a_loose_score_beside_the_state_dict_is_not_the_weights(tmp_path, state):
    score = torch.tensor(76.1)
    torch.save({"epoch": 3, "arch": "r", "state_dict": state, "best_acc1": score, "optimizer": {}}, tmp_path / "c.pt")
    found = read_weights(tmp_path / "c.pt")
    assert same(found, dict(state))
    assert found.notes[0] == (
        "unwrapped 'state_dict' of the checkpoint; beside it, not read: best_acc1, arch, epoch, optimizer"
    )
    assert same(weights_process._unwrapped({"generator": state, "loss": score})[0], dict(state))
    own = {"scale": score, "shift": torch.zeros(1), "params": {"lr": 0.1}}  # weights themselves, and options
    assert weights_process._unwrapped(own)[0].keys() == {"scale", "shift"}
    large = {**state, "ema": {"0.weight": score}}
    assert same(weights_process._unwrapped(large)[0], dict(state))


def test_tied_names_stay_one_tensor(tmp_path):
    shared = torch.randn(4, 3)
    torch.save({"a": shared, "b": torch.zeros(2), "c": shared, "row": shared[1]}, tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt")
    assert list(found) == ["a", "b", "c", "row"]
    assert found["a"] is found["c"]
    assert torch.equal(found["row"], shared[1])
    assert found["row"].untyped_storage().nbytes() == 12  # not a view of all of it


def test_faults_1_to_5_say_what_is_wrong(tmp_path, state):
    torch.save(state, tmp_path / "resnet.pt")
    with pytest.raises(RejectedError, match=r"resnet\.pth'.*Nearest there: resnet\.pt"):
        read_weights(tmp_path / "resnet.pth")
    with pytest.raises(RejectedError, match=r"folder.*resnet\.pt"):
        read_weights(tmp_path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(RejectedError, match="0 bytes"):
        read_weights(tmp_path / "empty.pt")
    (tmp_path / "random.pt").write_bytes(bytes(range(11, 256)) * 20)
    with pytest.raises(RejectedError, match="4,900 bytes of no known format that begin 0b 0c"):
        read_weights(tmp_path / "random.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(RejectedError, match="pipe"):
        read_weights(tmp_path / "pipe.pt")


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b'{"metadata": {}, "weight_map": {}}', "JSON"),
        (b"cposix\nsystem\n(S'true'\ntR.", "text that begins"),  # a pickle of protocol 0
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
    ],
)
def test_fault_5_other_formats_are_named_whatever_the_file_is_called(tmp_path, head, what):
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(head)
        with pytest.raises(RejectedError, match=what):
            read_weights(tmp_path / name)


def test_a_folder_that_is_a_run_says_how_to_load_it(tmp_path):
    for name in ("plan.json", "form.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(RejectedError, match=r"pare\.load"):
        read_weights(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.99])
def test_fault_4_truncated_files(tmp_path, state, share):
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "c.safetensors")
    for path in list(tmp_path.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(RejectedError, match=r"truncated|damaged|unexpected") as raised:
            read_weights(path)
        assert path.name in str(raised.value)


def test_fault_4_the_offset_is_named(tmp_path):
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-5])
    end = len(data)
    with pytest.raises(RejectedError, match=f"ends at offset {end - 5:,}, and 'b' needs offsets {end - 16:,}–{end:,}"):
        read_weights(tmp_path / "a.safetensors")


def test_fault_6_whole_modules_are_refused_with_the_way_out(tmp_path):
    for name, zipped in (("zip.pt", True), ("legacy.pt", False)):
        torch.save(Whole(), tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(RejectedError, match=r"Whole.*state_dict\(\).*class as MODEL"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "inside a state_dict"])
def test_fault_7_a_malicious_pickle_never_executes(tmp_path, kind):
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    evil = Evil(canary)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(
            {"w": torch.zeros(2), "x": evil} if "state" in kind else evil,
            path,
            _use_new_zipfile_serialization=kind != "legacy",
        )
    with pytest.raises(RejectedError, match="state_dict"):
        read_weights(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(evil))  # the canary works
    assert canary.exists()


def test_fault_8_a_corrupted_entry_before_it_changes_nothing(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(canary), protocol=2))
        archive.writestr("archive/version", "3")
    data = bytearray(path.read_bytes())
    data[data.index(b"little")] ^= 0xFF  # its checksum does not fit any more
    path.write_bytes(bytes(data))
    with pytest.raises(RejectedError):
        read_weights(path)
    assert not canary.exists()


def test_fault_7_torch_refuses_what_the_look_would_let_through(tmp_path, monkeypatch):
    """The look comes first for its message; with it left out, weights_only refuses as well."""
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    torch.save({"w": torch.zeros(2), "x": Evil(canary)}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(RejectedError, match=r"asks to import posix\.system; nothing of it was run"):
        read_weights(path)
    monkeypatch.setattr(weights_process, "_limit_memory", lambda more_bytes: None)  # this is the tests' own process
    with pytest.raises(weights_process.Refused, match="UnpicklingError"):
        weights_process._load(path)
    assert not canary.exists()


def test_the_process_is_limited(tmp_path):
    """A pickle that claims a string of 2 GB, one that nests lists 10^5 deep, and one with a storage of 4 TB."""
    storage = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    storage += (
        b"\x8a\x06"
        + (10**12).to_bytes(6, "little")
        + b"tQK\x00\x8a\x06"
        + (10**12).to_bytes(6, "little")
        + b"\x85K\x01\x85\x89}tR."
    )
    evil = {
        "long": b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b".",
        "deep": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    }
    for name, pickled in {**evil, "storage": storage}.items():
        with zipfile.ZipFile(tmp_path / f"{name}.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/data/0", b"1234")
        with pytest.raises(RejectedError, match=f"{name}.pt"):
            read_weights(tmp_path / f"{name}.pt")


def test_fault_17_a_file_that_changes_meanwhile_is_refused(tmp_path, state, monkeypatch):
    save_file(state, tmp_path / "a.safetensors")
    read = weights_module._tensor

    def changing(*args):
        with (tmp_path / "a.safetensors").open("ab") as file:
            file.write(b"x")
        return read(*args)

    monkeypatch.setattr(weights_module, "_tensor", changing)
    with pytest.raises(RejectedError, match="must not change"):
        read_weights(tmp_path / "a.safetensors")


def test_fault_9_a_header_of_2_to_63_bytes(tmp_path):
    with pytest.raises(RejectedError, match="header"):
        read_weights(header_file(tmp_path / "a", b"{}", length=2**63))


def test_fault_10_too_many_tensors_and_too_long_headers(tmp_path):
    many = {f"t{i}": entry(i * 4, i * 4 + 4) for i in range(100_000)}
    began = time.process_time()
    assert len(read_weights(header_file(tmp_path / "many", many, bytes(400_000)))) == 100_000
    assert time.process_time() - began < 20
    too_many = {f"t{i}": 0 for i in range(200_001)}
    with pytest.raises(RejectedError, match="at most 200,000 tensors"):
        read_weights(header_file(tmp_path / "too many", too_many))
    with pytest.raises(RejectedError, match="at most 200,000 tensors"):  # 30 MB of brackets would be 1 GB of lists
        read_weights(header_file(tmp_path / "brackets", b'{"a":[' + b"[]," * 10**7 + b"[]]}"))
    with (tmp_path / "long").open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b"{")
        file.truncate(99_000_008)
    with pytest.raises(RejectedError, match="header"):
        read_weights(tmp_path / "long")
    with pytest.raises(RejectedError, match="JSON"):
        read_weights(header_file(tmp_path / "deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))


@pytest.mark.parametrize(
    ("header", "num_bytes", "why"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlap"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "hole"),
        ({"a": entry(0, 8, [3])}, 8, "shape × dtype"),
        ({"a": entry(0, 8)}, 4, "truncated"),
        ({"a": entry(0, 8)}, 12, "4 bytes after offset"),
        ({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, 8, "lists of counts"),
        ({"a": {"dtype": "F32", "shape": [2**61, 4], "data_offsets": [0, 0]}}, 0, "shape × dtype"),
        ({"a": {"dtype": "object", "shape": [1], "data_offsets": [0, 8]}}, 8, "dtype"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            4,
            "twice",
        ),
        ({"a": [1]}, 0, "must have dtype, shape and data_offsets"),
        ({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, 8, "Complex weights are refused"),
        ({"__metadata__": {}}, 0, "without any"),
    ],
)
def test_fault_11_offsets_that_do_not_fit(tmp_path, header, num_bytes, why):
    with pytest.raises(RejectedError, match=why):
        read_weights(header_file(tmp_path / "a.safetensors", header, bytes(num_bytes)))


def test_what_safetensors_writes_is_read_bit_for_bit(tmp_path, state):
    every = {**state, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "flags": torch.tensor([True, False])}
    every |= {f"bf{i}": torch.randn(i + 1).to(torch.bfloat16) for i in range(3)}
    save_file(every, tmp_path / "a", metadata={"plan": "x"})
    found = read_weights(tmp_path / "a")
    assert same(found, every)
    assert all(found[n].shape == t.shape for n, t in every.items())


def test_fault_16_zip_bombs_and_names_that_leave(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(RejectedError, match="bomb"):
        read_weights(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "slip.pt", "w") as archive:
        archive.writestr("../../etc/data.pkl", b"x")
    with pytest.raises(RejectedError, match="inside"):
        read_weights(tmp_path / "slip.pt")


def test_a_tensor_that_pretends_to_be_huge(tmp_path):
    torch.save({"x": torch.zeros(1).expand(10**9, 1000)}, tmp_path / "a.pt")
    with pytest.raises(RejectedError, match="4,000,000,000,000"):
        read_weights(tmp_path / "a.pt")


def test_archives_that_are_not_state_dicts_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/models/model.json", "{}")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", b"x")
    for name, what in (("m.pt2", "torch.export"), ("script.pt", "TorchScript"), ("a.npz", "NumPy")):
        with pytest.raises(RejectedError, match=what):
            read_weights(tmp_path / name)


def test_fault_21_complex_sparse_and_quantized_tensors_are_refused(tmp_path):
    tensors = {
        "complex": torch.zeros(2, dtype=torch.complex64),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.empty(2, device="meta"),
    }
    for kind, tensor in tensors.items():
        with pytest.raises(weights_process.Refused, match=f"{kind}.* 'w'"):
            weights_process._write({"w": tensor}, [], 10**6, tmp_path)
    torch.save({"w": tensors["complex"]}, tmp_path / "c.pt")
    with pytest.raises(RejectedError, match=r"complex tensor 'w'.*c\.pt"):
        read_weights(tmp_path / "c.pt")


def test_fault_23_tensors_of_a_missing_device_come_to_the_cpu(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        parts = {e.filename: archive.read(e) for e in archive.infolist()}
    name = next(n for n in parts if n.endswith("data.pkl"))
    assert parts[name].count(b"X\x03\x00\x00\x00cpu") >= 1
    parts[name] = parts[name].replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    with zipfile.ZipFile(tmp_path / "cuda.pt", "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    loaded = read_weights(tmp_path / "cuda.pt")
    assert same(loaded, dict(state))
    assert {t.device.type for t in loaded.values()} == {"cpu"}
