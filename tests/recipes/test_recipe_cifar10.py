from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from paredown.errors import RejectedError, UsageError
from paredown.recipes import cifar10
from paredown.train import check_roles, metric_values, predictor, task_from_module

DATA = Path(__file__).parents[2].parent / "shared" / "data"
shared = pytest.mark.skipif(not (DATA / "cifar10.npz").exists(), reason="no shared data here")
Image = pytest.importorskip("PIL.Image")


def archive(path: Path, *, size: int = 32, num: int = 2, **changes: object) -> Path:
    """A small archive of the same format."""
    parts = []
    for i in range(num):
        file = io.BytesIO()
        Image.fromarray(np.full((size, size, 3), 40 * i, np.uint8)).save(file, "WEBP", lossless=True)
        parts.append(file.getvalue())
    arrays = {
        "test_webp": np.frombuffer(b"".join(parts), np.uint8),
        "test_offsets": np.cumsum([0, *map(len, parts)]),
        "test_labels": np.arange(num, dtype=np.uint8),
    }
    np.savez(path, **{**arrays, **changes})
    return path


def test_images_are_read_and_normalised(tmp_path):
    images, labels = cifar10._read(archive(tmp_path / "cifar10.npz"), "test")
    assert images.shape == (2, 32, 32, 3)
    assert labels.tolist() == [0, 1]
    ((x, _),) = list(cifar10.test_batches(tmp_path))
    expected = [(40 / 255 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert x[1, :, 5, 7].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 33},
        {"test_webp": np.frombuffer(b"\x00" * 500, np.uint8)},
        {"test_offsets": np.array([0, 10**9, 2 * 10**9])},
        {"test_offsets": np.array([0, 0, 5])},
        {"test_labels": np.array([0, 10], np.uint8)},
        {"test_labels": np.array([object(), 1])},
    ],
)
def test_a_wrong_archive_is_refused(tmp_path, changes):
    with pytest.raises(RejectedError, match="must"):
        cifar10._read(archive(tmp_path / "cifar10.npz", **changes), "test")


def test_pickles_are_never_loaded(tmp_path):
    canary = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (canary,))

    path = archive(tmp_path / "cifar10.npz", test_labels=np.array([Evil(), Evil()], dtype=object))
    with pytest.raises(RejectedError, match="no pickles"):
        cifar10._read(path, "test")
    assert not canary.exists()


def test_missing_files_and_data_are_explained(tmp_path):
    with pytest.raises(UsageError, match="data=DIR"):
        task_from_module(cifar10)
    task = task_from_module(cifar10, data=tmp_path)
    with pytest.raises(RejectedError, match=r"resnet20_cifar10.safetensors"):
        task.model()
    with pytest.raises(RejectedError, match=r"cifar10\.npz"):
        check_roles(task)


def test_crops_and_flips_are_windows_of_the_padded_image():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 32, 32, 3), dtype=torch.uint8)
    out = cifar10.cropped_and_flipped(images)
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    flips, shifts = 0, set()
    for image, got in zip(images.numpy(), out.numpy(), strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if np.array_equal(got, padded[top : top + 32, left : left + 32][:, :: -1 if flip else 1])
        ]
        assert len(found) == 1
        flips += found[0][2]
        shifts.add(found[0][:2])
    assert 16 < flips < 48
    assert len(shifts) > 30


def test_the_networks_have_the_published_sizes():
    count = [sum(p.numel() for p in cifar10.CifarResNet(n).parameters()) for n in (3, 9)]
    assert count == [269_722, 853_018]
    assert cifar10.CifarResNet(3).eval()(cifar10.inputs()).shape == (2, 10)


@shared
def test_the_weights_fit_by_name():
    model = cifar10.model(DATA)
    assert not model.training
    assert float(model.bn1.running_var.mean()) != 1.0
    with pytest.raises(RejectedError, match="56 layers"):
        cifar10._pretrained(9, DATA / "resnet20_cifar10.safetensors")


@shared
@pytest.mark.slow
def test_the_reader_agrees_with_the_folders_own():
    spec = importlib.util.spec_from_file_location("shared_load", DATA / "load.py")
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    images, labels = theirs.cifar10("train")
    mine, mine_labels = cifar10._read(DATA / "cifar10.npz", "train")
    assert np.array_equal(mine.numpy(), images)
    assert np.array_equal(mine_labels.numpy(), labels)


@shared
@pytest.mark.slow
def test_the_roles_are_apart_and_balanced():
    task = task_from_module(cifar10, data=DATA)
    roles = check_roles(task)
    assert (roles.num_calibration, roles.num_choose, roles.num_test) == (256, 2000, 10_000)
    (train, train_labels), (choose, choose_labels) = cifar10._train_split(DATA)
    assert torch.bincount(choose_labels).tolist() == [200] * 10
    assert torch.bincount(train_labels).tolist() == [1100] * 10
    assert int(torch.bincount(choose_labels[:256], minlength=10).min()) > 10
    assert {x.tobytes() for x in train.numpy()}.isdisjoint({x.tobytes() for x in choose.numpy()})


@shared
@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("model", 91.73), ("resnet56", 93.39)])
def test_the_published_accuracy_is_reached(name, expected):
    task = task_from_module(cifar10, data=DATA)
    value, each = metric_values(task.metric, task.evaluate(predictor(getattr(cifar10, name)(DATA))))
    assert value == pytest.approx(expected, abs=0.005)
    assert each is not None
    assert len(each) == 10_000


@shared
def test_scratch_trains_a_network_of_any_shape_from_its_weights():
    task = task_from_module(cifar10, data=DATA)
    torch.manual_seed(0)
    small = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(192, 10))
    before = cifar10.evaluate(predictor(small), cifar10.choose_batches(DATA))["accuracy"].mean()
    trained = task.scratch(small, epochs=1, extra_epochs=1, seed=1)
    after = cifar10.evaluate(predictor(trained), cifar10.choose_batches(DATA))["accuracy"].mean()
    assert before < 20
    assert after > 25
