"""File size against tensors: real files written by torch and safetensors, nothing unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from paredown.errors import RejectedError
from paredown.examine import examine, file_size, state_size
from paredown.program import capture


def test_a_clean_file_raises_no_alarm_and_reconciles(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    found = file_size(tmp_path / "a.pt")
    assert found.file_bytes == (tmp_path / "a.pt").stat().st_size
    assert found.tensor_bytes == found.stored_bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert found.alarms == ()


def test_a_saved_view_is_found_in_the_file_and_in_the_state(tmp_path: Path) -> None:
    big = torch.zeros(1000, 10)
    state = {"head.weight": big[:3]}
    torch.save(state, tmp_path / "a.pt")
    found = file_size(tmp_path / "a.pt")
    assert (found.tensor_bytes, found.stored_bytes) == (120, 40_000)
    assert "head.weight" in found.alarms[0]
    assert "40,000" in found.alarms[0]
    assert state_size(state).alarms == found.alarms


def test_masks_ties_and_optimizer_state_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    alarms = " | ".join(file_size(tmp_path / "a.pt").alarms)
    assert "weight_orig" in alarms
    assert "tied" in alarms
    assert "optimizer" in alarms
    plain = state_size(model.state_dict(keep_vars=True))
    assert plain.naive_bytes - plain.unique_bytes == 8 * 8 * 4


def test_the_estimate_is_the_size_of_the_safetensors_file(tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    size = (tmp_path / "a.safetensors").stat().st_size
    assert abs(state_size(state).safetensors_bytes - size) <= 8  # the order of keys moves the padding
    found = file_size(tmp_path / "a.safetensors")
    assert (found.file_bytes, found.alarms) == (size, ())
    assert found.tensor_bytes == sum(t.numel() * t.element_size() for t in state.values())


def test_examine_measures_a_given_file_and_writes_none(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    program = capture(model, torch.zeros(2, 4), train=False)
    cost = examine(program, file=tmp_path / "a.pt")
    assert (cost.file_badge, cost.file_bytes) == ("measured", (tmp_path / "a.pt").stat().st_size)
    assert examine(program).file_badge == "estimated"
    assert cost.state_dict_bytes == 80
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (__import__("os").system, (f"touch {self.path}",))


def test_a_malicious_pickle_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"w": torch.zeros(3), "evil": Canary(canary)}, tmp_path / "a.pt")
    assert file_size(tmp_path / "a.pt").tensor_bytes == 12
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Canary(canary)))
    assert file_size(tmp_path / "b.pt").tensor_bytes is None
    assert not canary.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8 + b"{}", b"\x10" + b"\0" * 7 + b'{"a":{"dtype":"F', b"\x02" + b"\0" * 7 + b"[]"]
)
def test_damaged_safetensors_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(RejectedError):
        file_size(tmp_path / "a.safetensors")


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    with pytest.raises(RejectedError, match="overlap"):
        file_size(tmp_path / "a.safetensors")


def test_a_truncated_pt_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    with pytest.raises(RejectedError, match=r"Near it: a\.pt"):
        file_size(tmp_path / "b.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    at = data.index(b"ctorch")
    data[at : at + 30] = b"\xfe" * 30
    (tmp_path / "a.pt").write_bytes(bytes(data))
    with pytest.raises(RejectedError, match="damaged"):
        file_size(tmp_path / "a.pt")
