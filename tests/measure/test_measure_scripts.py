"""run_adb.sh and run_ssh.sh against stand-ins for adb, ssh and the phone's programs (bundle_case): no phone is at hand here.

What the stand-ins print is what the real ones print; whether a real phone does as they do is not tested by this.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bundle_case import ADB, BENCHMARK_MODEL, EXECUTOR_RUNNER, GETPROP, PERF_TEST, SSH, program, started

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from paredown.errors import VerificationError
from paredown.export import export
from paredown.measure import Bundle, bundle, import_results, read_bundle

SCRIPTS = ("run_local.sh", "run_ssh.sh", "run_adb.sh")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    artifact = export((net, torch.zeros(2, 1, 8, 8)), folder / "net.onnx")
    return bundle(artifact, torch.randn(3, 1, 8, 8), out=folder / "it's a bundle")


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    """A folder that plays the phone, with its own getprop and one thermal sensor."""
    program(tmp_path / "phone/bin/getprop", GETPROP)
    (tmp_path / "phone/sys/thermal/thermal_zone0").mkdir(parents=True)
    (tmp_path / "phone/sys/thermal/thermal_zone0/temp").write_text("41500\n")
    program(tmp_path / "tools/adb", ADB)
    program(tmp_path / "tools/ssh", SSH)
    return tmp_path / "phone"


def on_phone(
    folder: Path, phone: Path, binary: Path, *more: str, fault: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    (folder / "results.json").unlink(missing_ok=True)
    tools = phone.parent / "tools"
    return started(
        [folder / "run_adb.sh", binary, *more], tools, PHONE=str(phone), FAULT=fault, READINGS="30", **environment
    )


def test_the_scripts_are_posix(made: Bundle) -> None:
    for name in SCRIPTS:
        for shell in ("dash", "bash", "busybox"):
            if shutil.which(shell):
                command = [shell, *(["sh"] if shell == "busybox" else []), "-n", str(made.folder / name)]
                assert subprocess.run(command, capture_output=True, check=False).returncode == 0, (shell, name)
        if shutil.which("shellcheck"):
            done = subprocess.run(["shellcheck", made.folder / name], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


def test_a_phone_with_onnxruntime_perf_test(made: Bundle, phone: Path) -> None:
    binary = program(phone.parent / "arm64/onnxruntime_perf_test", PERF_TEST)
    (binary.parent / "libonnxruntime.so").write_bytes(b"\x7fELF")
    done = on_phone(made.folder, phone, binary)
    assert done.returncode == 0, done.stderr + done.stdout
    record = import_results(made.folder / "results.json", made)
    latency = record.measured["latency_ms"]
    assert latency.n == 30 and 0 < latency.value < 1000
    assert record.environment["device"]["name"] == "Stand-in Phone <1>"
    assert "Android 14 arm64-v8a" in latency.machine
    assert record.details["series"][0]["celsius"] == [41.5, 41.5]
    assert "golden_max_error" not in record.measured and "writes none" in record.details["not_tested"][0]
    assert list(phone.glob("paredown*")) == []  # nothing stays on the phone


def test_a_phone_with_executor_runner_returns_outputs(made: Bundle, phone: Path, tmp_path: Path) -> None:
    """The script's way with executor_runner, whose stand-in executes an ONNX file."""
    folder = tmp_path / "executor"
    shutil.copytree(made.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["program"] = "executor_runner"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    binary = program(tmp_path / "executor_runner", EXECUTOR_RUNNER)
    done = on_phone(folder, phone, binary, "AAA1", "1")
    assert done.returncode == 0, done.stderr + done.stdout
    record = import_results(folder / "results.json", folder)
    assert record.measured["latency_ms"].n == 30  # ten more were run to warm up
    assert record.details["golden"]["samples"] == 3 and record.details["golden"]["holds"]
    program(binary, EXECUTOR_RUNNER.replace("array.tofile", "(array + 0.5).tofile"))
    assert on_phone(folder, phone, binary).returncode == 0
    with pytest.raises(VerificationError, match="computes something else"):
        import_results(folder / "results.json", folder)


def test_a_phone_with_benchmark_model(made: Bundle, phone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "litert"
    shutil.copytree(made.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["program"] = "benchmark_model"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    binary = program(tmp_path / "benchmark_model", BENCHMARK_MODEL)
    done = on_phone(folder, phone, binary, "AAA1", "2")
    assert done.returncode == 0, done.stderr + done.stdout
    record = import_results(folder / "results.json", read_bundle(folder))
    assert record.measured["latency_ms"].value == pytest.approx(5.1505)
    assert "10 run(s) per reading" in record.measured["latency_ms"].protocol
    assert record.environment["threads"] == 2


FAULTS = {
    "none": ("no phone is attached", "USB debugging"),
    "two": ("2 phones are attached: AAA1", "run_adb.sh PROGRAM SERIAL"),
    "unauthorized": ("does not trust this machine", "Allow USB debugging"),
    "offline": ("AAA1 is offline", "adb reconnect offline"),
    "udev": ("may not speak to the phone over USB", "udev rules"),
    "recovery": ("in the state 'recovery'", "Start Android"),
    "full-df": ("10 kB free", "adb -s AAA1 shell rm -r /data/local/tmp/paredown"),
    "full-push": ("no space on the phone", "adb -s AAA1 shell rm -r"),
    "unplug-push": ("the phone went away", "adb devices"),
    "unplug-run": ("the phone went away (run)", "nothing was kept"),
    "selinux": ("the phone forbids it", "adb -s AAA1 shell getenforce"),
    "abi": ("whose ABI is arm64-v8a", "Build it for that ABI"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_on_a_phone_says_the_next_step(made: Bundle, phone: Path, fault: str) -> None:
    binary = program(phone.parent / "onnxruntime_perf_test", PERF_TEST)
    done = on_phone(made.folder, phone, binary, fault=fault)
    assert done.returncode == 8, done.stdout + done.stderr
    for words in FAULTS[fault]:
        assert words in done.stderr
    assert done.stderr.count("error:") == 1
    assert not (made.folder / "results.json").exists()


def test_the_phone_is_chosen_by_its_serial(made: Bundle, phone: Path) -> None:
    binary = program(phone.parent / "onnxruntime_perf_test", PERF_TEST)
    assert on_phone(made.folder, phone, binary, "BBB2", fault="two").returncode == 0
    done = on_phone(made.folder, phone, binary, "CCC3", fault="two")
    assert done.returncode == 8 and "no phone 'CCC3' is attached. Attached: AAA1" in done.stderr


def test_wrong_words_are_refused_before_anything_is_started(made: Bundle, phone: Path, tmp_path: Path) -> None:
    binary = program(phone.parent / "onnxruntime_perf_test", PERF_TEST)
    for arguments, said in (
        ((), "PROGRAM must be a path"),
        ((tmp_path / "rm",), "PROGRAM must be a path"),
        ((tmp_path / "executor_runner",), "no program at"),
        ((program(tmp_path / "benchmark_model", BENCHMARK_MODEL),), "PROGRAM must be onnxruntime_perf_test"),
        ((binary, "; rm -rf /"), "SERIAL must be"),
        ((binary, "AAA1", "0"), "THREADS and READINGS"),
        ((binary, "AAA1", "two"), "THREADS and READINGS"),
    ):
        done = started([made.folder / "run_adb.sh", *arguments], phone.parent / "tools", PHONE=str(phone))
        assert done.returncode in (2, 8) and said in done.stderr, (arguments, done.stderr)
    for host in ("", "-oProxyCommand=touch x", "a b", "$(touch x)"):
        done = started([made.folder / "run_ssh.sh", host], phone.parent / "tools")
        assert (done.returncode, "HOST must be" in done.stderr) == (2, True)


def test_without_adb_or_python(made: Bundle, tmp_path: Path) -> None:
    binary = program(tmp_path / "onnxruntime_perf_test", PERF_TEST)
    bare = tmp_path / "bare"
    bare.mkdir()
    for tool in ("sh", "dirname", "basename"):
        (bare / tool).symlink_to(str(shutil.which(tool)))
    env = {"PATH": str(bare)}
    done = subprocess.run([made.folder / "run_adb.sh", binary], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 8 and "Install Android's platform-tools" in done.stderr


def test_over_ssh(made: Bundle, phone: Path) -> None:
    tools = phone.parent / "tools"
    before = set(Path("/tmp").glob("paredown.*"))
    done = started([made.folder / "run_ssh.sh", "board", "1"], tools, READINGS="30", REMOTE_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr + done.stdout
    assert import_results(made.folder / "results.json", made).details["golden"]["holds"]
    assert set(Path("/tmp").glob("paredown.*")) <= before  # nothing stays there
    (made.folder / "results.json").unlink()
    for fault, host, said in (
        ("", "elsewhere", "ssh-copy-id elsewhere"),
        ("unplug-run", "board", "went away in the middle"),
    ):
        done = started([made.folder / "run_ssh.sh", host], tools, FAULT=fault, REMOTE_PYTHON=sys.executable)
        assert done.returncode == 8 and said in done.stderr, done.stderr
        assert not (made.folder / "results.json").exists()
