"""Products with a matrix that is held, x @ W, as the linear layers that they are: runtimes have int8 kernels for those."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.quantize.decompose import attach, fetch, op_name

aten = torch.ops.aten
OF = "transpose of"
"""In the meta of a node that holds Wᵀ: the attribute that holds W, which is the one that the user knows."""
FROM = "computed from"
"""In the meta of a node that holds what is computed from parameters (see computed.py): the one of them that stands for all."""


def products_as_layers(graph: fx.GraphModule) -> None:
    """x @ W, x @ W + b and addmm(b, x, W) → linear(x, Wᵀ, b), in place, for a held W [inputs, outputs] and a held b [outputs].

    Wᵀ is a tensor of its own, one for all products with W; where the model writes x @ Vᵀ it is V itself, of which nothing is copied.
    """
    transposed: dict[fx.Node, fx.Node] = {}
    for node in list(graph.graph.nodes):
        x, weight, bias = _factors(node)
        if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not _has_rows(x):
            continue
        held = _transpose(graph, weight, transposed)
        if held is None or (bias is not None and not _is_bias(bias, node)):
            continue
        last = node
        if bias is None and len(node.users) == 1:  # a sum behind it may be the bias
            last, bias = _sum(node)
        with graph.graph.inserting_before(last):
            new = graph.graph.call_function(aten.linear.default, (x, held, *((bias,) if bias is not None else ())))
        new.meta.update(node.meta)
        last.replace_all_uses_with(new)
        graph.graph.erase_node(last)
        if last is not node:
            graph.graph.erase_node(node)
    drop_unread(graph, {str(w.target) for w in transposed})


def _factors(node: fx.Node) -> tuple[Any, Any, Any]:
    """x, W and b of x @ W + b; Nones for any other op."""
    name = op_name(node)
    if name in ("matmul", "mm") and len(node.args) == 2:
        return node.args[0], node.args[1], None
    if name == "addmm" and len(node.args) == 3 and all(v == 1 for v in node.kwargs.values()):
        return node.args[1], node.args[2], node.args[0]
    return None, None, None


def _transpose(graph: fx.GraphModule, weight: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A node that holds Wᵀ, for a W that is held as it is or turned; None for any other."""
    if is_turn(weight) and _is_matrix(weight.all_input_nodes[0]):
        return weight.all_input_nodes[0]
    if not _is_matrix(weight):
        return None
    if weight not in known:
        tensor, value = fetch(graph, str(weight.target)).detach().t().contiguous(), weight.meta["val"]
        with graph.graph.inserting_after(weight):
            made = graph.graph.get_attr(_attached(graph, weight, tensor))
        made.meta["val"] = value.fake_mode.from_tensor(tensor, static_shapes=True)
        made.meta[OF] = str(weight.meta.get(FROM, weight.target))
        made.meta |= {key: weight.meta[key] for key in (FROM,) if key in weight.meta}
        known[weight] = made
    return known[weight]


def _attached(graph: fx.GraphModule, weight: fx.Node, tensor: Tensor) -> str:
    """A parameter or a buffer, as W is: buffers are not trained."""
    name = attach(graph, f"{weight.target}_transposed", tensor)
    if not isinstance(fetch(graph, str(weight.target)), nn.Parameter):
        as_buffer(graph, name)
    return name


def as_buffer(graph: fx.GraphModule, name: str) -> None:
    """Make a buffer of a parameter."""
    path, _, leaf = name.rpartition(".")
    owner, tensor = graph.get_submodule(path), fetch(graph, name).detach()
    delattr(owner, leaf)
    owner.register_buffer(leaf, tensor)


def is_turn(node: fx.Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    name = op_name(node)
    if name in ("t", "numpy_T", "mT"):
        return True
    axes: Any = node.args[1:] if name in ("transpose", "swapaxes") else node.args[1] if name == "permute" else ()
    whole = all(isinstance(a, int) for a in axes)
    return len(axes) == 2 and whole and [a % 2 for a in axes] in ([[0, 1], [1, 0]] if name != "permute" else [[1, 0]])


def _is_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "get_attr" and isinstance(value, Tensor) and value.dim() == 2 and value.dtype == torch.float32


def _is_bias(node: Any, product: fx.Node) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) and node.op == "get_attr" else None
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.shape == product.meta["val"].shape[-1:]


def _has_rows(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() >= 2 and value.dtype == torch.float32


def _sum(product: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The addition of a bias that alone reads a product, and the bias; the product itself and None where it is something else."""
    reader = next(iter(product.users))
    if op_name(reader) != "add" or len(reader.args) != 2 or reader.kwargs:
        return product, None
    others = [a for a in reader.args if a is not product]
    return (reader, others[0]) if len(others) == 1 and _is_bias(others[0], product) else (product, None)  # type: ignore[return-value]


def drop_unread(graph: fx.GraphModule, names: Iterable[str]) -> None:
    """Leave none of these tensors behind that nothing reads any more."""
    graph.graph.eliminate_dead_code()
    for name in set(names) - {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}:
        path, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(path), leaf)
    graph.recompile()
