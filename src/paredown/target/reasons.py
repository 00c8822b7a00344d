"""Why an op computes in float in a runtime, as a table: ops by the name of the exported graph and by the runtimes' own names."""

from __future__ import annotations

from collections.abc import Mapping

from paredown.target.tables import Target

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "XNNPACK", "litert": "LiteRT"}
"""First part of a target's name → what its kernels are called by."""

# Reason → ops, in lower case without underscores. {} stands for the runtime.
_FAMILIES = {
    "no integer kernel worth using in {}: small probabilities share the code of 0": "softmax logsoftmax safesoftmax",
    "no integer kernel in {}: mean and variance are of floats": (
        "layernorm nativelayernorm groupnorm nativegroupnorm instancenorm rmsnorm batchnorm nativebatchnorm layernormalization "
        "skiplayernormalization simplifiedlayernormalization groupnormalization instancenormalization batchnormalization mvn "
        "rms lpnormalization linalgvectornorm"
    ),
    "does not pay in {}: a product of two activations": (
        "scaleddotproductattention matmul bmm baddbmm einsum fusedmatmul transposematmul attention multiheadattention batchmatmul "
        "batchmatrixmultiply"
    ),
    "no integer kernel worth using in {}": "convtranspose1d convtranspose2d convtranspose3d convtranspose deconvolution transposeconv",
    "no integer kernel in {} with ranges from samples": (
        "lstm gru rnntanh rnnrelu rnn lstmsequence grusequence rnnsequence rnnseq lstmcell grucell rnncell"
    ),
    "no integer kernel in {} for this curve": (
        "gelu fastgelu biasgelu quickgelu silu hardswish sigmoid hardsigmoid tanh elu mish softplus erf exp log sqrt rsqrt pow "
        "sin cos reciprocal logistic hardtanh"
    ),
    "no integer kernel in {} for this reduction": (
        "mean sum amax amin var std norm reducemean reducesum reducemax reducemin reducel2 reduce cumsum"
    ),
    "looks rows up: nothing is multiplied": "embedding gather gatherelements gathernd",
    "works on sizes, indices or constants": (
        "arange full zeros ones zeroslike oneslike fulllike shape range constantofshape nonzero onehot topk argmax sort triu tril"
    ),
    "rounds what stays float all the same": "fakequantize",
    "its weight is in float: asked for by float_layers, computed, or of a kind without codes in {}": (
        "conv1d conv2d conv3d linear conv fusedconv nhwcfusedconv gemm fusedgemm convolution groupconvolution fullyconnected "
        "depthwiseconv2d depthwiseconv2dcopy conv2dnhwc"
    ),
}
REASONS: Mapping[str, str] = {op: reason for reason, ops in _FAMILIES.items() for op in ops.split()}
"""Op → why it stays float where it does."""
NEIGHBOURS = "stands between ops in float: codes there would cost and gain nothing"
UNKNOWN = "no integer kernel in {} that the table of targets knows"


def why_float(table: Target, op: str) -> str:
    """Why an op, or a node of the runtime's own graph, computes in float on a target.

    >>> from paredown.target import named
    >>> why_float(named("onnxruntime-x86"), "layer_norm")
    'no integer kernel in ONNX Runtime: mean and variance are of floats'
    >>> why_float(named("openvino-x86"), "Softmax")
    'no integer kernel worth using in OpenVINO: small probabilities share the code of 0'
    """
    key = _key(op)
    weighted = {_key(name) for name, kind in table.ops.items() if kind == "weighted"}
    if key not in weighted and key in {_key(name) for name in (*table.ops, *table.fusions)} | _JOINS:
        return NEIGHBOURS
    return REASONS.get(key, UNKNOWN).format(TITLES[table.name.partition("-")[0]])


def _key(op: str) -> str:
    return op.lower().replace("_", "").rpartition(".")[2]


_JOINS = set(
    "globalaveragepool averagepool maxpool pooling clip relu prelu eltwise concat transpose subgraph add mul sub div multiply subtract pad slice split".split()
)
"""The runtimes' names for what has an integer kernel, or moves values."""
