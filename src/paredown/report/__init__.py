"""Report: from the records of a run to one HTML file that opens anywhere, and to one JSON document.

Nothing but records.jsonl is read, and neither torch nor a runtime is imported. The page holds no script, fetches nothing,
prints, and works at phone width and by keyboard. Every name in it is escaped: a module may be called `</style>`.

The records, one per stage and in order. cell = {"stage": NAME, "title": text, "recipe_digest", "task", "target"}.

    examine      the dense model, no file
    dense        its FP32 file
    level-1 …    pruned FP32 file after the recovery of each level
    int8         file in codes of the last level; its name is the scheme, which the verdict calls "quantized"
    twin-int8    that of a dense network of equal size, trained from scratch (may be absent)
    device-…     what a device measured with a bundle, read back (may be absent)
    verdict      last

Stages with a file carry plan_digest, and in `measured`: "bytes", "gzip_bytes", "stripped_bytes" (without metadata),
"parameters", "macs", "metric", "metric_change" (paired, after - dense), "simulated_metric" (int8: in PyTorch), "latency_ms"
(median, low–high is p10–p90), "speedup" (against the dense file), "peak_memory_bytes", "memory_bytes". In `details`: "file"
(relative to the run folder), "files", "float_nodes", "int8_nodes" (count or list), "check" {max_error, scale, cosine},
"proof" {max_error, scale, moved, mode, own_move}, "realiser", "layers" [{name, kind, parameters, macs, parameter_bytes,
activation_bytes}], "removed" [{space, kind, before, after, parameters}], "reached" {budget, reached, blocked_by}, "history"
(epochs: loss), "notes". examine's details: layers, uncounted, alarms, pinned [{reason, units, where}], parameters, macs,
peak_activation_bytes. verdict's: recommended (stage), otherwise (stage, where the file in codes is slower than the dense one),
target_met, metric {name, unit, goal}, bounds [{what, bound, value, unit, margin, met, badge, high: upper end of its 95 % interval, where it has one}], not_tested, normalisation, input
{name, shape}, snippet (of recommended), otherwise_snippet, warnings. environment, on every record: {versions, machine, isa,
threads, seed, …}.

Any entry of measured or details may be missing; it is then shown as "not tested". A figure that was not measured is marked
wherever it stands.
"""

from paredown.report.document import report_json
from paredown.report.page import read_run, render, write_report
from paredown.report.pictures import mask_picture

__all__ = ["mask_picture", "read_run", "render", "report_json", "write_report"]
