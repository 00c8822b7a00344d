from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paredown.errors import RejectedError, ResourceError
from paredown.weights import MOST_TENSORS, read_weights


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


def test_dtypes_are_kept(tmp_path):
    state = {
        k: torch.ones(3, dtype=k_) for k, k_ in (("a", torch.float16), ("b", torch.bfloat16), ("c", torch.float64))
    }
    torch.save(state, tmp_path / "mixed.pt")
    assert {n: t.dtype for n, t in read_weights(tmp_path / "mixed.pt").items()} == {
        n: t.dtype for n, t in state.items()
    }


def test_a_checkpoint_gives_its_state_dict_and_says_so(tmp_path, state):
    torch.save({"epoch": 3, "model": state, "optimizer": {"lr": 0.1}}, tmp_path / "c.pt")
    found = read_weights(tmp_path / "c.pt")
    assert same(found, dict(state))
    assert any("model" in note for note in found.notes)
    torch.save({"generator": state, "critic": state}, tmp_path / "two.pt")
    with pytest.raises(RejectedError, match="which of them"):
        read_weights(tmp_path / "two.pt")


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
    with pytest.raises(RejectedError, match="no known format"):
        read_weights(tmp_path / "random.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_fault_4_truncated_files(tmp_path, state, share):
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "c.safetensors")
    for path in list(tmp_path.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(RejectedError, match=r"truncated|damaged"):
            read_weights(path)


def test_fault_6_whole_modules_are_refused_with_the_way_out(tmp_path):
    for name, zipped in (("zip.pt", True), ("legacy.pt", False)):
        torch.save(Whole(), tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(RejectedError, match=r"whole pickled module.*Whole.*state_dict\(\).*MODEL"):
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
    with pytest.raises((RejectedError, ResourceError)):
        read_weights(path)
    assert not canary.exists()


def test_fault_9_a_header_of_2_to_63_bytes(tmp_path):
    with pytest.raises(RejectedError, match="header"):
        read_weights(header_file(tmp_path / "a", b"{}", length=2**63))


def test_fault_10_too_many_tensors_and_too_long_headers(tmp_path):
    many = {f"t{i}": entry(0, 0, [0]) for i in range(MOST_TENSORS + 1)}
    with pytest.raises(RejectedError, match=f"{MOST_TENSORS:,}"):
        read_weights(header_file(tmp_path / "many", many))
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
        ({"a": entry(0, 8)}, 12, "last tensor"),
        ({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, 8, "lists of counts"),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, 0, "lists of counts"),
        ({"a": {"dtype": "object", "shape": [1], "data_offsets": [0, 8]}}, 8, "dtype"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            4,
            "twice",
        ),
        ({"a": [1]}, 0, "must have dtype, shape and data_offsets"),
    ],
)
def test_fault_11_offsets_that_do_not_fit(tmp_path, header, num_bytes, why):
    with pytest.raises(RejectedError, match=why):
        read_weights(header_file(tmp_path / "a.safetensors", header, bytes(num_bytes)))


def test_what_safetensors_writes_is_accepted(tmp_path, state):
    save_file({**state, "empty": torch.zeros(0, 3)}, tmp_path / "a", metadata={"plan": "x"})
    assert read_weights(tmp_path / "a")["empty"].shape == (0, 3)


def test_fault_16_zip_bombs_and_names_that_leave(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(RejectedError, match="bomb"):
        read_weights(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "slip.pt", "w") as archive:
        archive.writestr("../../etc/data.pkl", b"x")
    before = set(tmp_path.iterdir())
    with pytest.raises(RejectedError):
        read_weights(tmp_path / "slip.pt")
    assert set(tmp_path.iterdir()) == before


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
    }
    for name, tensor in tensors.items():
        torch.save({"w": tensor}, tmp_path / f"{name}.pt")
        with pytest.raises(RejectedError, match=f"{name}|pickle"):
            read_weights(tmp_path / f"{name}.pt")


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
