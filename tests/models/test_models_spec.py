from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paredown.errors import MissingError, RejectedError, UsageError
from paredown.models import import_timm, import_torchvision, load_model, load_task_module, shipped_tasks

ZOO = pytest.mark.skipif(
    not (find_spec("torchvision") and find_spec("timm")), reason="torchvision and timm are not installed: paredown[zoo]"
)
NET = """
from torch import nn
from neighbour import WIDTH

class Net(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, x):
        return self.layer(x)

def wide(width):
    return Net(width)

def broken():
    numbers = []
    return numbers[3]

def no_model():
    return 5

ready = Net(2)
NUMBER = 7
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "my net.py").write_text(NET)
    (tmp_path / "nets" / "neighbour.py").write_text("WIDTH = 3\n")
    yield tmp_path
    for name in [n for n in sys.modules if n == "neighbour" or n.startswith("own_package")]:
        del sys.modules[name]


def test_a_file_relative_to_the_recipe(folder):
    path = list(sys.path)
    model, given = load_model("nets/my net.py:Net", base_dir=folder)
    assert (type(model).__name__, model.layer.in_features, given) == ("Net", 3, False)
    assert sys.path == path
    again, _ = load_model(f"{folder}/nets/my net.py:Net")
    assert type(again) is type(model)  # one file is one module
    assert torch.equal(pickle.loads(pickle.dumps(model)).layer.weight, model.layer.weight)
    ready, _ = load_model("nets/my net.py:ready", base_dir=folder)
    assert ready.layer.in_features == 2


def test_a_file_relative_to_the_current_folder_and_changed_meanwhile(folder, monkeypatch):
    monkeypatch.chdir(folder / "nets")
    old, _ = load_model("my net.py:Net")
    (folder / "nets" / "my net.py").write_text(NET.replace("nn.Linear(width, 1)", "nn.Linear(width, 9)"))
    new, _ = load_model("my net.py:Net")
    assert (old.layer.out_features, new.layer.out_features) == (1, 9)


def test_a_file_of_a_package_may_import_its_neighbours_relatively(folder):
    (folder / "nets" / "width.py").write_text("WIDTH = 5\n")
    own = "from torch import nn\nfrom .width import WIDTH\n\ndef make():\n    return nn.Linear(WIDTH, 1)\n"
    (folder / "nets" / "relative.py").write_text(own)
    assert load_model("nets/relative.py:make", base_dir=folder)[0].in_features == 5
    (folder / "nets" / "relative.py").write_text(own.replace("WIDTH\n\n", "DEPTH\n\n"))
    with pytest.raises(RejectedError, match=r"cannot import name 'DEPTH'.*relative\.py:2"):
        load_model("nets/relative.py:make", base_dir=folder)


def test_a_package_beside_the_recipe(folder):
    (folder / "own_package").mkdir()
    (folder / "own_package" / "__init__.py").touch()
    (folder / "own_package" / "inner.py").write_text("from torch import nn\n\ndef make():\n    return nn.Identity()\n")
    path = list(sys.path)
    assert isinstance(load_model("own_package.inner:make", base_dir=folder)[0], nn.Identity)
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "error", "why"),
    [
        ("resnet50", UsageError, "torchvision:NAME, timm:NAME"),
        (":Net", UsageError, "torchvision:NAME"),
        ("nets/my net.py:", UsageError, "torchvision:NAME"),
        ("nets/my_net.py:Net", UsageError, "Nearest there: my net.py"),
        ("nets/my net.py:Nett", UsageError, "has no 'Nett'. It has: Net"),
        ("nets/my net.py:NUMBER", UsageError, "Got a int"),
        ("nets/my net.py:wide", UsageError, r"needs width.*def model\(\)"),
        ("nets/my net.py:no_model", UsageError, "must be an nn.Module. Got a int"),
        ("nets/my net.py:broken", RejectedError, r"IndexError.*my net\.py:18 \(return numbers\[3\]\)"),
        ("no_such_package.models:make", UsageError, "no 'no_such_package'"),
        ("torch.nn:Linnear", UsageError, "Linear"),
        ("torch..nn:Linear", UsageError, "importable"),
    ],
)
def test_what_is_wrong_is_said(folder, spec, error, why):
    with pytest.raises(error, match=why):
        load_model(spec, base_dir=folder)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import torch\n1 / 0\n", r"ZeroDivisionError.*bad\.py:2 \(1 / 0\)"),
        ("import torch\nx = (\n", r"SyntaxError.*bad\.py:2"),
        ("import torch\n\nimport not_installed_here\n", r"No module named 'not_installed_here' at bad\.py:3"),
    ],
)
def test_a_file_that_fails_is_told_with_its_own_line(tmp_path, code, why):
    (tmp_path / "bad.py").write_text(code)
    path, modules = list(sys.path), set(sys.modules)
    with pytest.raises(RejectedError, match=why):
        load_model("bad.py:Net", base_dir=tmp_path)
    with pytest.raises(RejectedError, match=why):
        load_task_module("bad.py", tmp_path)
    assert sys.path == path
    assert not [n for n in set(sys.modules) - modules if "bad" in n]


def test_weights_are_read_and_said(folder):
    weights = {"module.layer.weight": torch.full((1, 3), 2.0), "module.layer.bias": torch.ones(1)}
    save_file(weights, folder / "w.safetensors")
    with pytest.raises(RejectedError, match=r"--strip-prefix module\."):
        load_model("nets/my net.py:Net", folder / "w.safetensors", base_dir=folder)
    model, given = load_model("nets/my net.py:Net", folder / "w.safetensors", folder, strip_prefix=True)
    assert given
    assert model(torch.ones(1, 3)).item() == 7.0


def test_task_modules_by_name_by_file_and_by_package(folder):
    assert {"digits", "cifar10"} <= set(shipped_tasks())
    assert load_task_module("digits").__name__ == "paredown.recipes.digits"
    (folder / "digits.py").write_text("NAME = __name__\n")
    module = load_task_module("digits.py", folder)
    assert module.NAME.rsplit(".", 1)[-1] == "digits"  # what records call the task, the same on every machine
    assert load_task_module(str(folder / "digits.py")) is module
    (folder / "own_package.py").write_text("X = 1\n")
    assert load_task_module("own_package", folder).X == 1
    with pytest.raises(UsageError, match="Did you mean digits"):
        load_task_module("digts", folder)
    with pytest.raises(UsageError, match=r"Nearest there: digits\.py"):
        load_task_module("digit.py", folder)
    with pytest.raises(UsageError, match=r"a path that ends in \.py"):
        load_task_module("../x", folder)


@ZOO
def test_torchvision_models_are_random_and_healthy():
    torch.manual_seed(0)
    model, given = load_model("torchvision:squeezenet1_1")
    assert not given
    assert sum(p.numel() for p in model.parameters()) == 1_235_496
    torchvision = import_torchvision()
    assert import_torchvision() is torchvision
    assert hasattr(torch.ops.torchvision, "nms")
    for name in ("googlenet", "inception_v3"):
        weights = dict(load_model(f"torchvision:{name}")[0].named_parameters())
        assert all(torch.isfinite(p).all() for p in weights.values())
        assert min(p.std() for p in weights.values() if p.dim() > 1) > 1e-3
    with pytest.raises(UsageError, match="Nearest: resnet50"):
        load_model("torchvision:resnet5O")


@ZOO
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_models_whose_official_weights_want_another_input_say_so(name, tmp_path):
    model, _ = load_model(f"torchvision:{name}")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=rf"{name}.*transform_input=True"):
        load_model(f"torchvision:{name}", tmp_path / "w.safetensors")


@ZOO
def test_a_users_file_that_imports_torchvision_works_beside_any_torch(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torchvision.models import squeezenet1_1\n\ndef model():\n    return squeezenet1_1()\n"
    )
    code = (
        "from paredown.models import load_model\n"
        f"print(type(load_model('net.py:model', base_dir={str(tmp_path)!r})[0]).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SqueezeNet"]


@ZOO
def test_detection_models_take_no_backbone_from_the_network(monkeypatch):
    import_torchvision()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    model, _ = load_model("torchvision:lraspp_mobilenet_v3_large")
    assert isinstance(model, nn.Module)


@ZOO
def test_timm_models_and_no_hub():
    import_timm()
    assert isinstance(load_model("timm:resnet10t")[0], nn.Module)
    for name in ("hf-hub:someone/net", "local-dir:/tmp", "resnet10tt"):
        with pytest.raises(UsageError, match="one of timm's"):
            load_model(f"timm:{name}")


def test_a_missing_library_names_the_extra():
    code = (
        "import sys; sys.modules['torchvision'] = None; sys.modules['timm'] = None\n"
        "from paredown.models import load_model\n"
        "for spec in ('torchvision:resnet18', 'timm:resnet18'):\n"
        "    try: load_model(spec)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(MissingError.__name__) and "pip install 'paredown[zoo]'" in line for line in lines)
