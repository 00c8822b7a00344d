"""Ranks: two processes of torchrun train what one does, hold the same bits all along, and only one of them writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_script as script
import torch
from safetensors.torch import load_file
from torch import Tensor

from paredown.errors import RejectedError, UsageError
from paredown.train import fit, recover
from paredown.train.checkpoint import model_tensors
from paredown.train.ranks import Ranks, own_device


def rank(number: int, world: int) -> Ranks:
    return Ranks(rank=number, world=world, device=torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("length", range(3, 20))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_are_the_batch_and_weigh_what_they_hold(length: int, world: int) -> None:
    batch = {"x": torch.arange(length), "y": (np.arange(length), [torch.ones(length, 2)]), "scale": 2.5, "none": None}
    parts = [rank(r, world).part(batch, length) for r in range(world)]
    assert torch.cat([p["x"] for p in parts]).tolist() == list(range(length))
    assert np.concatenate([p["y"][0] for p in parts]).tolist() == list(range(length))
    assert {len(p["y"][1][0]) for p in parts} <= {length // world, length // world + 1}
    assert all(p["scale"] == 2.5 and p["none"] is None for p in parts)
    weights = [rank(r, world).weight(length) for r in range(world)]
    losses = [p["x"].double().mean() for p in parts]
    mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / world
    assert float(mean) == pytest.approx((length - 1) / 2)


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        (torch.ones(1, 2), 1, r"a sample for every rank\. Got 1 for 2"),
        ((torch.ones(4, 2), torch.ones(3)), 4, r"samples on axis 0.*Got shape \(3,\)"),
        ((torch.ones(4, 2), ["a", "b", "c", "d"]), 4, r"samples on axis 0.*Got str"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(batch: Any, length: int, message: str) -> None:
    with pytest.raises(RejectedError, match=message):
        rank(0, 2).part(batch, length)


def test_without_torchrun_it_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"process group\. Got none\. Run by torchrun"):
        fit(script.plain(), script.batches, script.step, epochs=1, distributed=True)
    with pytest.raises(UsageError, match=r"distributed must come with step"):
        recover(Small(), train=lambda model: model, distributed=True)


class Small:
    module = script.plain()
    program = None


def test_cuda_is_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(d) for d in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


# -------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left."""
    out = tmp_path_factory.mktemp("ranks")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script.__file__, str(out)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def told(run: Path) -> list[dict[str, Any]]:
    return [json.loads((run / f"{r}.json").read_text()) for r in range(2)]


def left(run: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return load_file(run / f"0-{name}.safetensors"), load_file(run / f"1-{name}.safetensors")


@pytest.mark.parametrize("name", ["same", "grown", "observed", "rolled", "continued"])
def test_both_ranks_hold_the_same_bits(run: Path, name: str) -> None:
    first, second = left(run, name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_two_ranks_with_halves_are_one_process_with_the_whole(run: Path, told: list[dict[str, Any]]) -> None:
    alone = script.train()
    mine, start = model_tensors(alone.module), model_tensors(script.masked())
    theirs, _ = left(run, "same")
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor.detach(), rtol=2e-5, atol=2e-6, msg=name)
        assert (tensor - start[name]).abs().max() > 1e-3  # far more than the tolerance: it was trained
    assert told[0]["history"] == told[1]["history"] == pytest.approx([e.loss for e in alone.history], rel=1e-5)
    kept = script.masks()["3.weight"].kept
    assert np.array_equal(theirs["3.weight"].numpy() != 0, kept)


def test_a_mask_that_moves_by_gradients_moves_alike(run: Path) -> None:
    grown, start = left(run, "grown")[0]["3.weight"] != 0, torch.from_numpy(script.masks()["3.weight"].kept)
    assert int(grown.sum()) <= 308 and bool((grown != start).any())
    alone = script.train(hooks=[script.growing()]).module.get_parameter("3.weight") != 0
    assert (grown != alone).float().mean() < 0.01  # rounding may turn a tie


def test_each_rank_has_its_own_samples_and_its_own_dropout(run: Path, told: list[dict[str, Any]]) -> None:
    first, second = (t["ids"] for t in told)
    assert len(first) == len(second) == 8
    for epoch in (slice(0, 4), slice(4, 8)):
        every = [i for ids in (*first[epoch], *second[epoch]) for i in ids]
        assert sorted(every) == list(range(script.NUM))  # each once: both read the same batches all along
    assert [len(ids) for ids in first] == [6, 6, 6, 4] * 2
    assert told[0]["dropped"] != told[1]["dropped"] and len(set(told[0]["dropped"])) > 4


def test_buffers_are_those_of_rank_0(run: Path, told: list[dict[str, Any]]) -> None:
    buffers, _ = left(run, "observed")
    assert int(buffers["seen"]) == sum(map(len, told[0]["ids"])) == 44
    assert buffers["short"].dtype == torch.int16 and bool((buffers["short"] == 44).all())
    assert float(buffers["smallest"]) < -2
    assert int(buffers["norm.num_batches_tracked"]) == 8


def test_all_ranks_roll_back_where_one_diverges(told: list[dict[str, Any]]) -> None:
    assert told[0]["notes"] == told[1]["notes"]
    assert [bool(note) for note in told[0]["notes"]] == [False, True, False]
    assert "nan" in told[0]["notes"][1]


def test_only_rank_0_writes_and_tells(run: Path, told: list[dict[str, Any]]) -> None:
    assert (run / "own-0/training.safetensors").is_file()
    assert not (run / "own-1").exists()
    assert told[0]["progress"] == 3 * (4 + 1) and told[1]["progress"] == 0


def test_an_interrupted_training_continues_to_the_same_bits(run: Path) -> None:
    continued, same = left(run, "continued")[0], left(run, "same")[0]
    assert all(torch.equal(continued[n], same[n]) for n in same)


def test_ranks_that_differ_are_refused_on_all_of_them(told: list[dict[str, Any]]) -> None:
    for one in told:
        assert one["other masks"].startswith("VerificationError: all ranks must have the same weights and masks")
        assert one["other weights"].startswith("UsageError: all ranks must have the same options and weights")
        assert "Got others at rank 1 than at rank 0 of 2" in one["other masks"]
        assert one["unused"].startswith("RejectedError: every trainable parameter must take part in the loss")
        assert one["too small"].startswith("RejectedError: a batch must have a sample for every rank")
