"""A run as the pipeline records it: a small residual network on the handwritten digits."""

from __future__ import annotations

from typing import Any

from paredown.records import Measured, Record

MACHINE = {
    "cpu": "Some CPU @ 2.6 GHz",
    "isa": ["avx2", "avx512_vnni"],
    "int8_dot": True,
    "cores": 2,
    "memory_bytes": 8 * 10**9,
    "system": "Linux x86_64",
    "python": "3.11.9",
}
ENVIRONMENT = {
    "versions": {
        "paredown": "0.1.0",
        "torch": "2.13.0",
        "torchao": "0.18.0",
        "onnx": "1.19.1",
        "onnxruntime": "1.23.2",
        "numpy": "2.2.0",
    },
    "machine": MACHINE,
    "threads": 2,
    "seed": 0,
}
WIDTHS = {"dense": (24, 48, 96), "level-1": (16, 32, 64), "level-2": (8, 24, 40)}
LATENCY = "median, low–high is the 10th–90th percentile; 1 thread, 10 warm-up runs, 12 run(s) per reading"


def layers(widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Conv layers of a residual network with these widths on 8 × 8 images."""
    found, before, side = [], 1, 8
    for stage, width in enumerate(widths, start=1):
        for block in (1, 2):
            name = f"stage{stage}.{block - 1}.conv{block}"
            parameters = 9 * before * width
            macs = parameters * side * side
            found.append(
                {
                    "name": name,
                    "kind": "conv2d",
                    "parameters": parameters,
                    "macs": macs,
                    "parameter_bytes": 4 * parameters,
                    "activation_bytes": 4 * width * side * side,
                }
            )
            before = width
        side //= 2
    found.append(
        {
            "name": "head",
            "kind": "linear",
            "parameters": 10 * before + 10,
            "macs": 10 * before,
            "parameter_bytes": 40 * before + 40,
            "activation_bytes": 40,
        }
    )
    return found


def measured(
    widths: tuple[int, ...], metric: float, change: float | None, latency: float, *, int8: bool = False
) -> dict[str, Measured]:
    """What measure finds of a file."""
    table = layers(widths)
    parameters, macs = sum(n["parameters"] for n in table), sum(n["macs"] for n in table)
    size = parameters * (1 if int8 else 4) + 9_000
    found = {
        "bytes": Measured(value=size, unit="B", n=1, protocol="stat of 1 file(s)"),
        "gzip_bytes": Measured(value=int(size * 0.91), unit="B", n=1, protocol="gzip level 9, no time stamp"),
        "stripped_bytes": Measured(value=size - 1_500, unit="B", n=1, protocol="stat without metadata"),
        "parameters": Measured(value=parameters, unit="", protocol="counted in the exported graph"),
        "macs": Measured(value=macs, unit="MAC", protocol="counted in the exported graph, one sample"),
        "metric": Measured(
            value=metric,
            unit="%",
            low=metric - 1.1,
            high=metric + 0.7,
            n=540,
            protocol="mean over samples; 95 % Wilson score interval",
        ),
        "latency_ms": Measured(
            value=latency, unit="ms", low=latency * 0.97, high=latency * 1.2, n=200, protocol=LATENCY, timing=True
        ),
        "peak_memory_bytes": Measured(value=61_500_000, unit="B", n=1, protocol="peak; own process", timing=True),
        "memory_bytes": Measured(
            value=4_500_000, unit="B", n=1, protocol="peak minus after import; own process", timing=True
        ),
    }
    if change is not None:
        found["metric_change"] = Measured(
            value=change,
            unit="%",
            low=change - 0.6,
            high=change + 0.5,
            n=540,
            protocol="after - before on the same 540 samples",
        )
        ratio = 0.118 / latency
        found["speedup"] = Measured(
            value=ratio,
            unit="×",
            low=ratio * 0.96,
            high=ratio * 1.05,
            n=200,
            protocol="median of the baseline / median of this file",
            timing=True,
        )
    return found


def record(stage: str, title: str, **fields: Any) -> Record:
    """One record of the sample run."""
    cell = {"stage": stage, "title": title, "recipe_digest": "9f2c" * 16, "task": "digits", "target": "onnxruntime-x86"}
    return Record(cell=cell, environment=ENVIRONMENT, **fields)


def exported(stage: str, widths: tuple[int, ...], int8: bool = False, **more: Any) -> dict[str, Any]:
    """Details of a stage with a file."""
    ops = [f"QLinearConv: {n['name']}" for n in layers(widths)] if int8 else []
    return {
        "file": f"{stage}.onnx",
        "files": [f"{stage}.onnx"],
        "digest": "ab12" * 16,
        "float_nodes": ["Softmax: probabilities"] if int8 else [f"Conv: {n['name']}" for n in layers(widths)],
        "int8_nodes": ops,
        "check": {"max_error": 0.021 if int8 else 3.1e-6, "scale": 18.2, "cosine": 0.99991 if int8 else 1.0},
        "layers": layers(widths),
        **more,
    }


def removed(before: tuple[int, ...], after: tuple[int, ...]) -> list[dict[str, Any]]:
    """Spaces of the residual network."""
    rows = []
    for stage, (b, a) in enumerate(zip(before, after, strict=True), start=1):
        for block in (1, 2):
            name = f"stage{stage}.{block - 1}.conv{block}.weight"
            rows.append(
                {
                    "space": f"{name}[0]",
                    "kind": "channel",
                    "before": b,
                    "after": a,
                    "parameters": [f"{name}[0]", f"stage{stage}.0.bn{block}.weight[0]"],
                }
            )
    return rows


def level(number: int, metric: float, change: float, latency: float, loss: list[float]) -> Record:
    """A pruned stage."""
    names = list(WIDTHS)
    before, widths = WIDTHS[names[number - 1]], WIDTHS[names[number]]
    proof = {"max_error": 4.1e-6 * number, "scale": 3.3, "moved": 1.7, "mode": "float32", "own_move": 9.4}
    details = exported(
        names[number],
        widths,
        proof=proof,
        realiser="module",
        removed=removed(before, widths),
        reached={"budget": {"channels": 0.6}, "reached": {"channels": 0.61}, "blocked_by": "rounding to 8 channels"},
        history=[{"epoch": i, "loss": value} for i, value in enumerate(loss)],
    )
    return record(
        f"level-{number}",
        f"Pruned, level {number}, FP32",
        plan_digest="77aa" * 16,
        measured=measured(widths, metric, change, latency),
        details=details,
    )


def verdict(**more: Any) -> Record:
    """The verdict of the sample run."""
    snippet = "import numpy as np\nimport onnxruntime as ort\n\nsession = ort.InferenceSession('int8.onnx')\nprint(session.run(None, {'x': np.zeros([1, 1, 8, 8], np.float32)}))"
    details = {
        "recommended": "int8",
        "target_met": True,
        "metric": {"name": "accuracy", "unit": "%", "goal": "max"},
        "bounds": [
            {
                "what": "metric_loss",
                "bound": 1.0,
                "value": 0.37,
                "unit": "%",
                "margin": 0.63,
                "met": True,
                "badge": "measured",
            },
            {
                "what": "size_bytes",
                "bound": 60_000,
                "value": 40_010,
                "unit": "B",
                "margin": 19_990,
                "met": True,
                "badge": "measured",
            },
        ],
        "not_tested": ["latency on the phone: these timings are of this machine", "runtimes other than ONNX Runtime"],
        "normalisation": "pixel / 16, then minus 0.5",
        "input": {"name": "x", "shape": ["batch", 1, 8, 8]},
        "snippet": snippet,
        "warnings": [
            "On this machine the pruned FP32 file is faster than the INT8 file; INT8 buys size here, not time."
        ],
        **more,
    }
    return record("verdict", "Verdict", details=details)


def insight() -> Record:
    """The closer look of the sample run, as of a regression so that every part of it is there."""
    names = [n["name"] for n in layers(WIDTHS["level-2"])]
    figures = {
        "peak_flops": Measured(value=3.1e10, unit="FLOP/s", protocol="matrix product", timing=True),
        "bandwidth": Measured(value=8e9, unit="B/s", protocol="copy", timing=True),
        "peak_int8": Measured(value=1.2e11, unit="OP/s", protocol="product of integers", timing=True),
    }
    both = {"value": 98.0, "low": 96.5, "high": 98.9}
    details = {
        "subject": "int8",
        "bits": {
            "moved": "",
            "layers": [
                {"name": f"{n}.weight", "kind": "conv2d", "parameters": 90, "bits": 8, "weight_db": 41.0 - i, "input_db": 44.5}
                for i, n in enumerate(names)
            ],
        },
        "changed": {
            "n": 540,
            "hits": False,
            "turns": {"gained": 2, "lost": 4, "both": 528, "neither": 6},
            "worst": {"n": 54, "dense": 61.5, "now": 58.0, "of_dense": 60.25},
            "slices": [
                {"column": "hospital", "value": "north", "n": 80, "dense": 98.0, "now": 91.0, "change": -7.0, "low": -9.0, "high": -5.0},
                {"column": "hospital", "value": "south", "n": 90, "dense": 97.0, "now": 97.5, "change": 0.5, "low": -1.0, "high": 2.0},
            ],
            "few": [{"column": "hospital", "value": "west", "n": 3}],
            "most": [{"id": "image-0074", "dense": 100.0, "now": 0.0}],
            "best": [{"id": "image-0240", "dense": 0.0, "now": 100.0}],
            "named": True,
            "scatter": [[1.0, 2.0], [2.0, 2.5], [3.0, 2.0]],
        },
        "bias": {"files": {
            "dense": {"value": 0.1, "low": -0.2, "high": 0.4, "n": 540, "scatter": [[1.0, 1.1], [2.0, 2.3]]},
            "int8": {"value": 1.9, "low": 1.5, "high": 2.3, "n": 540, "scatter": [[1.0, 2.9], [2.0, 3.9]],
                     "predicted": [2.9, 3.9], "truth": [0.001, 0.002], "apart": True},
        }},
        "noise": {"spread": 0.3, "rows": [
            {"kind": "none", "strength": 0.0, "dense": both, "now": both},
            {"kind": "blur", "strength": 1.0, "dense": both, "now": {**both, "value": 88.0}},
        ]},
        "roofline": [
            {"name": names[0], "kind": "conv2d", "flops": 1_179_648, "bytes": 53_248},
            {"name": "head", "kind": "linear", "flops": 1280, "bytes": 2896},
        ],
        "slices_given": True,
        "noise_asked": True,
    }  # fmt: skip
    return record("insight", "A closer look", measured=figures, details=details)


def sample() -> list[Record]:
    """All records of the run."""
    dense, small = WIDTHS["dense"], WIDTHS["level-2"]
    total = layers(dense)
    examine = {
        "layers": total,
        "parameters": sum(n["parameters"] for n in total),
        "macs": sum(n["macs"] for n in total),
        "peak_activation_bytes": 24_576,
        "uncounted": [],
        "alarms": ["the file holds one weight twice"],
        "pinned": [
            {"reason": "output of the model", "units": 10, "where": "linear (digits.py:31)"},
            {"reason": "input of the model", "units": 1, "where": "x"},
        ],
    }
    proof = {"max_error": 8.2e-6, "scale": 3.3, "moved": 1.7, "mode": "float32", "own_move": 9.4}
    int8 = measured(small, 98.52, -0.37, 0.061, int8=True)
    int8["simulated_metric"] = Measured(value=98.52, unit="%", n=540)
    twin = measured((12, 24, 32), 97.41, -1.48, 0.058, int8=True)
    return [
        record("examine", "The dense model", details=examine),
        record("dense", "Dense FP32", measured=measured(dense, 98.89, None, 0.118), details=exported("dense", dense)),
        level(1, 98.7, -0.19, 0.072, [0.41, 0.22, 0.13, 0.11]),
        level(2, 98.52, -0.37, 0.049, [0.62, 0.35, 0.24, 0.21, 0.2]),
        record(
            "int8",
            "INT8 of level 2",
            plan_digest="77aa" * 16,
            measured=int8,
            details=exported(
                "int8", small, int8=True, proof=proof, realiser="module", notes=["28 nodes share a scale"]
            ),
        ),
        record(
            "twin-int8",
            "Equal-size dense network, INT8",
            measured=twin,
            details=exported("twin-int8", (12, 24, 32), int8=True),
        ),
        insight(),
        verdict(),
    ]
