"""A small bundle, results of it, and stand-ins for hardware that no test machine has: an adb, an ssh, a phone's programs.

The stand-ins speak as the real ones do (what they print, their exit codes) and run commands in a folder instead of on a
phone. The model is executed by the real ONNX Runtime all the same.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from paredown.measure.bundled.runner import digest

ADB = """#!{python} -SE
import os, pathlib, shutil, subprocess, sys
root, fault = pathlib.Path(os.environ["PHONE"]), os.environ.get("FAULT", "")
args = sys.argv[1:]
LISTS = {{
    "none": "", "two": "AAA1\\tdevice\\nBBB2\\tdevice\\n", "unauthorized": "AAA1\\tunauthorized\\n", "offline": "AAA1\\toffline\\n",
    "udev": "AAA1\\tno permissions (missing udev rules? user is in the plugdev group); see [http://developer.android.com]\\n",
    "recovery": "AAA1\\trecovery\\n",
}}
def gone():
    print("error: device 'AAA1' not found", file=sys.stderr)
    sys.exit(1)
def local(path):
    return pathlib.Path(str(path).replace("/data/local/tmp", str(root)))
if args == ["devices"]:
    print("* daemon not running; starting now at tcp:5037\\n* daemon started successfully", file=sys.stderr)
    sys.stdout.write("List of devices attached\\n" + LISTS.get(fault, "AAA1\\tdevice\\n") + "\\n")
    sys.exit(0)
assert args[0] == "-s" and args[1] in ("AAA1", "BBB2"), args
what, rest = args[2], args[3:]
if what == "get-state":
    gone() if "unplug" in fault else print("device")
elif what == "push":
    if fault == "unplug-push": gone()
    if fault == "full-push":
        print("adb: error: failed to copy 'x' to '/data/local/tmp/paredown/x': remote couldn't create file: No space left on device", file=sys.stderr); sys.exit(1)
    source, target = rest[0], local(rest[1])
    if source.endswith("/."):
        shutil.copytree(source[:-2], target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target / pathlib.Path(source).name if target.is_dir() else target)
    print("1 file pushed, 0 skipped.")
elif what == "pull":
    source, target = local(rest[0]), pathlib.Path(rest[1])
    if rest[0].endswith("/."):
        shutil.copytree(str(source)[:-2] if str(source).endswith("/.") else source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)
elif what == "shell":
    (command,) = rest
    if "./program" in command:
        if fault == "unplug-run": sys.exit(255)
        for kind, words in (("selinux", "can't execute: Permission denied"), ("abi", "not executable: 64-bit ELF file")):
            if fault == kind:
                print(f"/system/bin/sh: ./program: {{words}}\\r\\nparedown-exit=126\\r"); sys.exit(0)
    if fault == "full-df" and command.startswith("{{ df"):
        print("Filesystem 1K-blocks Used Available Use% Mounted on\\n/dev/block/dm-8 1000 990 10 99% /data\\nparedown-exit=0"); sys.exit(0)
    env = {{**os.environ, "PATH": str(root / "bin") + ":" + os.environ["PATH"]}}
    done = subprocess.run(["sh", "-c", command.replace("/data/local/tmp", str(root)).replace("/sys/class", str(root / "sys"))], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    sys.stdout.write((done.stdout + done.stderr).replace("\\n", "\\r\\n"))  # as a phone's terminal does
else:
    sys.exit(1)
"""

GETPROP = """#!/bin/sh
case $1 in
ro.product.cpu.abi) echo arm64-v8a ;;
ro.product.manufacturer) echo Stand-in ;;
ro.product.model) echo 'Phone <1>' ;;
ro.build.version.release) echo 14 ;;
*) echo ;;
esac
"""

PERF_TEST = '''#!{python}
"""onnxruntime_perf_test -m times -r N -x T -y 1 -e cpu MODEL CSV, with the real runtime: one line for every run."""
import sys, time
import onnx, onnxruntime
from onnx import numpy_helper
args = sys.argv[1:]
options = dict(zip(args[:-2:2], args[1:-2:2]))
assert set(options) == {{"-m", "-r", "-x", "-y", "-e"}} and options["-m"] == "times", args
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = int(options["-x"])
session = onnxruntime.InferenceSession(args[-2], settings, providers=["CPUExecutionProvider"])
feed = {{}}
for at, value in enumerate(session.get_inputs()):
    tensor = onnx.TensorProto.FromString(open(f"test_data_set_0/input_{{at}}.pb", "rb").read())
    assert tensor.name == value.name
    feed[value.name] = numpy_helper.to_array(tensor)
session.run(None, feed)
with open(args[-1], "a") as out:
    for run in range(int(options["-r"])):
        start = time.perf_counter()
        session.run(None, feed)
        out.write(f"paredown,{{time.perf_counter() - start}},12345678,50,{{run}}\\n")
print("Average inference time cost: 0.1 ms")
'''

EXECUTOR_RUNNER = '''#!{python}
"""executor_runner --model_path=M --inputs=A,B --output_file=P --num_executions=N, for the ONNX file of the test."""
import sys, time
import numpy as np, onnxruntime
options = dict(a[2:].split("=", 1) for a in sys.argv[1:])
session = onnxruntime.InferenceSession(options["model_path"], providers=["CPUExecutionProvider"])
feed = {{}}
for value, name in zip(session.get_inputs(), options["inputs"].split(",")):
    shape = [1 if isinstance(d, str) else d for d in value.shape]
    feed[value.name] = np.fromfile(name, "<f4").reshape(shape)
count = int(options.get("num_executions", 1))
for run in range(count):
    start = time.perf_counter()
    outputs = session.run(None, feed)
    print(f"I 00:00:00.1 executorch:executor_runner.cpp:1] Iteration {{run + 1}} of {{count}}: {{(time.perf_counter() - start) * 1e3:f}} ms")
if "output_file" in options:
    for at, array in enumerate(outputs):
        array.tofile(f"{{options['output_file']}}-{{at}}.bin")
'''

BENCHMARK_MODEL = """#!/bin/sh
# benchmark_model --graph=M --num_threads=T --warmup_runs=1 --num_runs=10 --min_secs=0
case "$*" in --graph=model.onnx\\ --num_threads=2\\ --warmup_runs=1\\ --num_runs=10\\ --min_secs=0) ;; *) exit 1 ;; esac
echo 'INFO: count=10 first=5200 curr=5100 min=5000 max=5300 avg=5150 std=80 p5=5000 median=5150 p95=5300'
echo 'INFO: Inference timings in us: Init: 812, First inference: 6210, Warmup (avg): 6210, Inference (avg): 5150.5'
"""

SSH = """#!/bin/sh
# ssh -o … -o … -- HOST COMMAND…: the command runs here, under a home of its own.
while [ "$1" != -- ]; do shift; done
[ "$2" = board ] || { echo "ssh: Could not resolve hostname $2: Name or service not known" >&2; exit 255; }
shift 2
case "$FAULT:$*" in unplug-run:*runner.py*) exit 255 ;; esac
exec sh -c "$*"
"""


def program(path: Path, text: str) -> Path:
    """An executable file; {python} is this Python, which has the runtime."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(python=sys.executable) if text.startswith("#!{python}") else text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def started(command: list[Any], path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of a bundle, with the stand-ins in front on PATH."""
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "PYTHON": sys.executable, "PAUSE": "0", **environment}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, env=env, timeout=300)


def sealed(path: Path, document: dict[str, Any]) -> Path:
    """results.json with a digest that fits: what a person who knows the format could write."""
    try:
        document["digest"] = digest(document)
    except ValueError:  # NaN and infinity have none
        document["digest"] = "0" * 64
    path.write_text(json.dumps(document))
    return path
