"""Runs the model of a bundle on this device and writes results.json. Needs Python 3.8, numpy and the model's runtime.

python3 runner.py [--threads N] [--out FILE]: run here. python3 runner.py --collect DIR: make results.json of what a
benchmark program left in DIR (run_adb.sh does this). python3 runner.py --steady DIR: exit 0 where the readings in DIR
are steady, 1 where they are not. Nothing of paredown is imported: this file travels with the bundle.
"""

# ruff: noqa: B905  (zip(strict=…) came with Python 3.10; devices have older ones)
from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
SCHEMA = 1
SERIES = 3
"""Series of readings at most: one that is disturbed is measured again after a pause."""
DRIFT = 1.10
"""Blocks of readings whose medians differ by more than this factor are no one speed."""
SPREAD = 1.5
"""Readings whose 90th percentile is more than this times their 10th were disturbed."""
_ISA = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimd", "asimddp", "i8mm", "sve")


# ------------------------------------------------------------------------------------------- shared with the importer


def digest(document: dict[str, Any]) -> str:
    """SHA-256 of a document without its own "digest": shows an edit by hand, and proves nothing against a forger."""
    rest = {k: v for k, v in document.items() if k != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def drift(times: Sequence[float]) -> float:
    """Largest over smallest median of five blocks of readings in order, where it is no accident; else 1.

    An accident is what shuffled readings do as well: the factor must exceed DRIFT, and the means of the blocks must lie
    further apart than in 198 of 200 shuffles (seed 0).

    >>> drift([1.0, 1.01, 0.99, 1.0] * 25)
    1.0
    >>> drift([1.0] * 50 + [1.5] * 50)
    1.5
    """
    if len(times) < 20:
        return 1.0
    medians = [statistics.median(block) for block in _blocks(times)]
    found = max(medians) / max(min(medians), 1e-12)
    if found <= DRIFT:
        return 1.0
    top = _ends(times)[1]
    mixed = [min(t, top) for t in times]  # one long reading must not decide
    apart, dice, beaten = _apart(mixed), random.Random(0), 0
    for _ in range(200):
        dice.shuffle(mixed)
        beaten += _apart(mixed) < apart
    return found if beaten >= 198 else 1.0


def disturbed(times: Sequence[float]) -> str:
    """Why readings are no one speed (other load, throttling), in words; "" where they are steady.

    >>> disturbed([1.0, 1.01, 0.99, 1.0] * 25)
    ''
    >>> disturbed([1.0] * 50 + [1.5] * 50)
    'drifts by a factor 1.50'
    """
    factor = drift(times)
    if factor > 1:
        return f"drifts by a factor {factor:.2f}"
    wide = spread(times)
    return f"is unsteady, p90 is {wide:.1f} × p10" if wide > SPREAD else ""


def spread(times: Sequence[float]) -> float:
    """90th over 10th percentile of the readings."""
    low, high = _ends(times)
    return high / max(low, 1e-12)


def _ends(times: Sequence[float]) -> tuple[float, float]:
    order = sorted(times)
    return order[len(order) // 10], order[min(len(order) - 1, len(order) * 9 // 10)]


def _blocks(times: Sequence[float]) -> list[Sequence[float]]:
    size = len(times) // 5
    return [times[i * size : (i + 1) * size] for i in range(5)]


def _apart(times: Sequence[float]) -> float:
    means = [math.fsum(block) / len(block) for block in _blocks(times)]
    return max(means) - min(means)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            found.update(piece)
    return found.hexdigest()


# -------------------------------------------------------------------------------------------------------------- running


def main(arguments: list[str] | None = None) -> int:
    """Run, or collect; exit code 0, 3 (a file is damaged) or 8 (the runtime is missing or older than the file)."""
    parser = argparse.ArgumentParser(description="Run the model of this bundle and write results.json.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of one series at most")
    parser.add_argument("--readings", type=int, default=200, help="readings of one series at most")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds of rest before a series is repeated")
    parser.add_argument("--collect", type=Path, help="folder that run_adb.sh pulled from the device")
    parser.add_argument("--steady", type=Path, help="folder of one series that run_adb.sh pulled")
    asked = parser.parse_args(arguments)
    if asked.threads < 1 or asked.readings < 20 or not asked.seconds > 0:
        parser.error("--threads must be at least 1, --readings at least 20 and --seconds above 0")
    if asked.steady is not None:
        return int(bool(disturbed(_program_readings(asked.steady)[0])))
    manifest = checked_manifest(HERE)
    found = collected(asked.collect, manifest) if asked.collect else measured(manifest, asked)
    found = {"schema": SCHEMA, "format": "paredown-results", "model": manifest["model"]["files"], **found}
    found["digest"] = digest(found)
    temporary = asked.out.with_name(asked.out.name + ".part")
    temporary.write_text(json.dumps(found, allow_nan=False) + "\n")
    temporary.replace(asked.out)
    for line in summary(found):
        print(line)
    return 0


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, once every file of the bundle has the checksum that it names."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256(path) != expected:
            stop(3, f"{name} is missing or damaged: its checksum is not that of the manifest. Copy the bundle again.")
    return manifest


def stop(code: int, message: str) -> NoReturn:
    """One message on stderr, and the exit code."""
    print("error: " + message, file=sys.stderr)
    raise SystemExit(code)


def measured(manifest: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Golden inputs first, then the clock: everything that results.json holds of a run on this device."""
    name = manifest["model"]["runtime"]
    run, version, settings = RUNTIMES[name](HERE / manifest["model"]["file"], asked.threads)
    feeds = [_golden_inputs(manifest, one) for one in manifest["golden"]]
    outputs = [_described(manifest["outputs"], run(feed)) for feed in feeds]
    series = [_series(run, feeds[0], asked)]
    while (why := disturbed(series[-1]["latencies_ms"])) and len(series) < SERIES:
        print(f"series {len(series)} {why}: resting {asked.pause:g} s, then again", file=sys.stderr)
        time.sleep(asked.pause)
        series.append(_series(run, feeds[0], asked))
    return {
        "device": device(),
        "runtime": {"name": name, "version": version, "settings": settings},
        "threads": asked.threads,
        "series": series,
        "throttled": throttled(),
        "outputs": outputs,
        "claimed": _errors(manifest, outputs),
    }


def _golden_inputs(manifest: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    specs = zip(manifest["inputs"], one["inputs"])
    return {s["name"]: np.fromfile(str(HERE / f), _little(s["dtype"])).reshape(s["shape"]) for s, f in specs}


def _little(kind: str) -> Any:
    import numpy as np

    return np.dtype(kind).newbyteorder("<")


def _described(specs: list[dict[str, Any]], arrays: Sequence[Any]) -> list[dict[str, Any]]:
    import numpy as np

    found = []
    for spec, returned in zip(specs, arrays):
        array = np.ascontiguousarray(returned)
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        shape, kind = list(array.shape), array.dtype.name
        found.append({"name": spec["name"], "dtype": kind, "shape": shape, "data": base64.b64encode(data).decode()})
    return found


def _errors(manifest: dict[str, Any], outputs: list[list[dict[str, Any]]]) -> list[list[float | None]]:
    """Largest error of every golden output, for the eye: the importer works it out again."""
    import numpy as np

    found: list[list[float | None]] = []
    for one, given in zip(manifest["golden"], outputs):
        row: list[float | None] = []
        for file, spec, got in zip(one["outputs"], manifest["outputs"], given):
            expected = np.fromfile(str(HERE / file), _little(spec["dtype"])).astype("float64")
            answer = np.frombuffer(base64.b64decode(got["data"]), _little(got["dtype"])).astype("float64")
            error = float(np.abs(answer - expected).max()) if expected.shape == answer.shape and answer.size else None
            if expected.size == answer.size == 0:
                error = 0.0
            row.append(error if error is not None and math.isfinite(error) else None)
        found.append(row)
    return found


def _series(run: Callable[[Any], Any], feed: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """Ten runs to warm up, then readings in order; runs below half a millisecond are timed in groups."""
    fastest = min(_timed(run, feed, 1) for _ in range(10))
    group = max(1, math.ceil(0.5 / max(fastest, 1e-6)))
    times: list[float] = []
    before, start = (celsius(), megahertz()), time.perf_counter()
    while len(times) < asked.readings and (len(times) < 20 or time.perf_counter() - start < asked.seconds):
        times.append(_timed(run, feed, group))
    after = (celsius(), megahertz())
    return {
        "latencies_ms": times,
        "runs_per_reading": group,
        "celsius": [before[0], after[0]],
        "megahertz": [before[1], after[1]],
    }


def _timed(run: Callable[[Any], Any], feed: Any, group: int) -> float:
    start = time.perf_counter()
    for _ in range(group):
        run(feed)
    return (time.perf_counter() - start) * 1e3 / group


def _onnxruntime(path: Path, threads: int) -> tuple[Callable[[Any], Any], str, dict[str, Any]]:
    try:
        import onnxruntime
    except ImportError:
        stop(8, "this model needs ONNX Runtime. Install it here: python3 -m pip install onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    settings = {"providers": "CPUExecutionProvider"}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        exact = b"exact_products" in file.read()
    if not exact:
        settings["session.x64quantprecision"] = "1"
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        _refused("onnxruntime " + onnxruntime.__version__, str(error))
    return lambda feed: session.run(None, feed), str(onnxruntime.__version__), settings


def _openvino(path: Path, threads: int) -> tuple[Callable[[Any], Any], str, dict[str, Any]]:
    try:
        import openvino
    except ImportError:
        stop(8, "this model needs OpenVINO. Install it here: python3 -m pip install openvino")
    core = openvino.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    try:
        model = core.read_model(str(path))
        specs = json.loads((HERE / "manifest.json").read_text())["inputs"]
        model.reshape({spec["name"]: spec["shape"] for spec in specs})
        request = core.compile_model(model, "CPU", settings).create_infer_request()
    except Exception as error:
        _refused("openvino " + openvino.__version__, str(error))

    def run(feed: Any) -> Any:
        request.infer(feed, share_inputs=True, share_outputs=True)
        return [request.get_output_tensor(i).data.copy() for i in range(len(model.outputs))]

    return run, str(openvino.__version__), {key: str(value) for key, value in settings.items()}


def _litert(path: Path, threads: int) -> tuple[Callable[[Any], Any], str, dict[str, Any]]:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        stop(8, "this model needs LiteRT. Install it here: python3 -m pip install ai-edge-litert")
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except Exception as error:
        _refused("ai-edge-litert " + _installed("ai-edge-litert"), str(error))
    places, results = interpreter.get_input_details(), interpreter.get_output_details()

    def run(feed: Any) -> Any:
        for place, array in zip(places, feed.values()):
            interpreter.set_tensor(place["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(r["index"]) for r in results]

    return run, _installed("ai-edge-litert"), {}


def _executorch(path: Path, threads: int) -> tuple[Callable[[Any], Any], str, dict[str, Any]]:
    try:
        import torch
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime
    except ImportError:
        stop(8, "this model needs ExecuTorch. Install it here: python3 -m pip install executorch")
    _unsafe_reset_threadpool(threads)
    try:
        program = Runtime.get().load_program(str(path))
        method = program.load_method("forward")
    except Exception as error:
        _refused("executorch " + _installed("executorch"), str(error))
    kept = (program, method)  # the method reads the program's memory

    def run(feed: Any) -> Any:
        return [o.numpy() for o in kept[1].execute([torch.from_numpy(a.copy()) for a in feed.values()])]

    return run, _installed("executorch"), {}


def _installed(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not told"


RUNTIMES: dict[str, Callable[[Path, int], tuple[Callable[[Any], Any], str, dict[str, Any]]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "litert": _litert,
    "executorch": _executorch,
}
"""Name of the runtime in the manifest → how it is opened here."""


def _refused(runtime: str, reason: str) -> NoReturn:
    text = " ".join(reason.split())
    if re.search(r"opset|ir version", text, re.IGNORECASE):
        needs = json.loads((HERE / "manifest.json").read_text())["requires"]
        way = "Install a newer one, or export with a lower --opset"
        stop(8, f"{runtime} is older than the model, which needs {json.dumps(needs)}. {way}. ({text[-300:]})")
    stop(3, f"{runtime} refused the model: {text[:500]}")


# --------------------------------------------------------------------------------------------------------------- device


def device() -> dict[str, Any]:
    """What this device is: no host name, no user name, no serial number."""
    info = _fields("/proc/cpuinfo")
    flags = (info.get("flags") or info.get("Features") or "").split()
    board = _text("/proc/device-tree/model").strip("\0 \n")
    return {
        "name": board or info.get("Model") or info.get("Hardware") or info.get("model name") or platform.machine(),
        "cpu": info.get("model name") or info.get("Hardware") or platform.processor() or platform.machine(),
        "isa": [f for f in _ISA if f in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _fields(path: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in _text(path).splitlines())
    found: dict[str, str] = {}
    for key, _, value in pairs:
        found.setdefault(key.strip(), value.strip())
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""  # the system does not say


def celsius() -> float | None:
    """Warmest sensor of the system; None where none can be read."""
    return warmest(_text(str(p)) for p in Path("/sys/class/thermal").glob("thermal_zone*/temp"))


def warmest(texts: Any) -> float | None:
    """Degrees of the warmest of some sensors; they say thousandths of a degree, a few whole degrees."""
    numbers = [int(t) for t in texts if t.strip().lstrip("-").isdigit()]
    degrees = [n / 1000 if abs(n) > 200 else float(n) for n in numbers]
    return max((d for d in degrees if 0 < d < 150), default=None)


def megahertz() -> float | None:
    """Clock of the fastest core now; None where the system does not say."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    numbers = [int(t) for t in (_text(str(p)).strip() for p in files) if t.isdigit()]
    return max(numbers) / 1000 if numbers else None


def throttled() -> bool | None:
    """Whether a Raspberry Pi says that it was throttled since it started; None where no such thing can be asked."""
    try:
        done = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5, check=False)
        return bool(int(done.stdout.strip().partition("=")[2], 16))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


# ------------------------------------------------------------------------------- what a benchmark program left (run_adb)


def collected(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """results.json of the series that run_adb.sh pulled: DIR/device.txt, DIR/series-1/, … and DIR/outputs/."""
    facts = dict(line.partition("=")[::2] for line in (folder / "device.txt").read_text().splitlines() if "=" in line)
    series = []
    for number in range(1, SERIES + 1):
        part = folder / f"series-{number}"
        if part.is_dir():
            times, group = _program_readings(part)
            heat = [warmest(_text(str(part / n)).split()) for n in ("celsius-before.txt", "celsius-after.txt")]
            series.append(
                {"latencies_ms": times, "runs_per_reading": group, "celsius": heat, "megahertz": [None, None]}
            )
    outputs = _pulled_outputs(folder / "outputs", manifest)
    name = " ".join(facts.get(k, "") for k in ("manufacturer", "model")).strip() or "unknown device"
    return {
        "device": {
            "name": name,
            "cpu": facts.get("soc") or facts.get("abi") or "unknown",
            "isa": [f for f in _ISA if f in facts.get("features", "").split()],
            "cores": int(facts["cores"]) if facts.get("cores", "").isdigit() else None,
            "system": f"Android {facts.get('android', '?')} {facts.get('abi', '?')}",
        },
        "runtime": {
            "name": manifest["model"]["runtime"],
            "version": "not told",
            "settings": {"program": facts["program"]},
        },
        "threads": int(facts["threads"]),
        "series": series,
        "throttled": None,
        "outputs": outputs,
        "claimed": None if outputs is None else _errors(manifest, outputs),
    }


def _program_readings(folder: Path) -> tuple[list[float], int]:
    """(milliseconds of every reading, runs that one reading is the mean of), from a program's own file or words."""
    table, said = folder / "readings.csv", _text(str(folder / "log.txt"))
    if table.is_file():  # onnxruntime_perf_test: model,seconds,peak bytes,processor share,number
        found = [float(line.split(",")[-4]) * 1e3 for line in table.read_text().splitlines() if line.count(",") >= 4]
        return _enough(found, folder), 1
    each = re.findall(r"Iteration \d+ of \d+: ([0-9.]+) ms", said)  # executor_runner
    if each:
        return _enough([float(t) for t in each], folder), 1
    means = re.findall(r"Inference \(avg\): ([0-9.e+]+)", said)  # benchmark_model, started once for every reading
    counts = re.findall(r"runs_per_reading=(\d+)", said)
    return _enough([float(t) / 1e3 for t in means], folder), int(counts[0]) if counts else 1


def _enough(times: list[float], folder: Path) -> list[float]:
    if len(times) < 5:
        words = " ".join(_text(str(folder / "log.txt")).split())[-500:]
        stop(8, f"the program on the device printed {len(times)} readings, 5 are needed. It said: {words}")
    return times


def _pulled_outputs(folder: Path, manifest: dict[str, Any]) -> list[list[dict[str, Any]]] | None:
    """Outputs that the program wrote, SAMPLE-OUTPUT.bin; None where it writes none: then they are not tested."""
    if not list(folder.glob("*.bin")):
        return None
    found = []
    for number in range(len(manifest["golden"])):
        row = []
        for at, spec in enumerate(manifest["outputs"]):
            data = (folder / f"{number}-{at}.bin").read_bytes()
            row.append({**spec, "data": base64.b64encode(data).decode()})
        found.append(row)
    return found


def summary(found: dict[str, Any]) -> list[str]:
    """What the person at the device wants to see."""
    steady = [s["latencies_ms"] for s in found["series"] if not disturbed(s["latencies_ms"])]
    times = steady[-1] if steady else min((s["latencies_ms"] for s in found["series"]), key=spread)
    low, high = _ends(times)
    lines = [f"median {statistics.median(times):.4g} ms (p10 {low:.4g}, p90 {high:.4g}, {len(times)} readings)"]
    if not steady:
        lines.append(f"all {len(found['series'])} series were disturbed: other load, or heat")
    if found["claimed"] is None:
        lines.append("outputs: not tested, this program writes none")
    else:
        errors = [e for row in found["claimed"] for e in row if e is not None]
        worst = f"{max(errors):.3g}" if errors else "none could be compared"
        lines.append(f"largest error of the golden outputs: {worst}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
