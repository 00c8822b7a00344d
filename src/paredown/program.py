"""Program: a model as its exported graphs and parameters by name. Capture is the only way in.

Both graphs are in the flat calling convention of torch.export: every parameter, buffer and lifted constant is a
placeholder, so that a name in `Program.state` and a node in the graph are one and the same thing.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import logging
import operator
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from paredown.errors import CaptureError, RejectedError
from paredown.placed import placed, where
from paredown.plain import plain_copy, refuse_bad_weights
from paredown.traced import drop_dtype_checks, known_shapes


class Inputs(NamedTuple):
    """Example inputs of a forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Program:
    """A captured model. Nothing in it is shared with the model it came from.

    `eval_graph` and `train_graph` are two captures over one state: an eval capture loses drop path, attention
    dropout and batch counters. `inputs` is (args, kwargs) with the example batch. `batch` is "dynamic" or
    "fixed: reason". `module` is a private copy of the user's model, for slicing by name; verbs copy it before use.
    """

    eval_graph: ExportedProgram
    train_graph: ExportedProgram | None
    state: Mapping[str, Tensor]
    """Parameters, buffers and lifted constants by name; tied names share one tensor."""
    inputs: Inputs
    batch: str
    source_digest: str
    """SHA-256 over graph text, names, shapes, dtypes and bytes of the state."""
    module: nn.Module
    notes: tuple[str, ...] = ()
    """What the capture changed or could not keep (folded parametrizations, a lost train graph, …)."""


def capture(model: nn.Module, inputs: Any, *, train: bool = True, dynamic_batch: bool = True) -> Program:
    """Capture a model in eval and train mode with torch.export; the model itself is not touched.

    `inputs` is a tensor, a tuple of args, or {"args": …, "kwargs": …}. Axis 0 of every input tensor that shares
    the first one's length is the batch; a batch of 1 is repeated once, because torch.export specialises it.
    With train=False only the eval graph is captured (enough to examine).

    Raises RejectedError (wrapped in script, NaN or infinite weights, complex weights, a quantized model, inputs that do not fit) and
    CaptureError (what torch.export cannot follow, with the user's own line).

    >>> program = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8))
    >>> program.batch
    'dynamic'
    """
    model, notes = plain_copy(model)
    refuse_bad_weights(model)
    args, kwargs = as_inputs(inputs)
    _try_forward(model, args, kwargs)
    example, batch = _batched(args, kwargs) if dynamic_batch else (Inputs(args, kwargs), "fixed: asked for")
    with quiet():
        try:
            eval_graph, example, batch = _export_eval(model.eval(), Inputs(args, kwargs), example, batch)
            if eval_graph.graph_module.meta.get(_AUTOCAST):
                notes += (
                    "regions under torch.autocast are captured in the dtypes of their weights, without its casts",
                )
            train_graph = None
            if train:
                train_graph, note = _export_train(model, example, batch)
                notes += note
                if train_graph is not None:
                    _part_constants(train_graph, eval_graph)
        finally:
            model.eval()
    notes += _time_first(eval_graph, batch)
    every = {**(train_graph.constants if train_graph else {}), **eval_graph.state_dict, **eval_graph.constants}
    state = {name: tensor for name, tensor in every.items() if isinstance(tensor, Tensor)}
    return Program(
        eval_graph=eval_graph,
        train_graph=train_graph,
        state=state,
        inputs=example,
        batch=batch,
        source_digest=_digest(eval_graph, state),
        module=model,
        notes=notes,
    )


def placeholder_names(graph: ExportedProgram) -> dict[str, str]:
    """Placeholder node name → name in the state, for parameters, buffers and lifted constants (not user inputs)."""
    sig = graph.graph_signature
    return {**sig.inputs_to_parameters, **sig.inputs_to_buffers, **sig.inputs_to_lifted_tensor_constants}


def least_batch(program: Program) -> int:
    """How many samples the eval graph takes at least: 1, or a divisor of the example's where it folds them into groups.

    A network that splits the batch into clips or pairs has tensors without elements in a batch of one. 1 where the batch is fixed.

    >>> least_batch(capture(nn.Linear(4, 2), torch.zeros(6, 4)))
    1
    """
    if program.batch != "dynamic":
        return 1
    length = int(next(t for t in pytree.tree_leaves(program.inputs) if isinstance(t, Tensor)).shape[0])
    values = [v for n in program.eval_graph.graph.nodes for v in pytree.tree_leaves(n.meta.get("val"))]
    shapes: list[Any] = [v.shape for v in values if isinstance(v, Tensor)]
    sizes = {s.node.expr for shape in shapes for s in shape if isinstance(s, torch.SymInt)}
    for count in (c for c in range(1, length) if length % c == 0):
        if all(_at(expression, count) > 0 for expression in sizes):
            return count
    return length


def _at(expression: Any, count: int) -> int:
    """A size in a batch of so many samples; one that depends on more than the batch counts as there."""
    try:
        value = expression.subs(dict.fromkeys(expression.free_symbols, count))
        return int(value) if value.is_number else 1
    except (ArithmeticError, TypeError, ValueError):
        return 0


def source_line(node: fx.Node) -> str:
    """The user's own line that made a node, as "file.py:12"; empty where torch kept none."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    for line in reversed(lines):
        if not any(foreign in line for foreign in ("/torch/nn/", "/torch/_", "<eval_with_key>")):
            path, _, rest = line[len('File "') :].partition('", line ')
            return f"{path.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return ""


def module_path(node: fx.Node) -> str:
    """Name of the innermost module that made a node, "" for the root."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bodies:
    """The stateless part of a GraphModel, by mode (train or not); copies of the model share it."""

    in_spec: Any
    wanted: tuple[Any, ...]
    """Per input: the sizes of a tensor (None where free), or a value that the graphs have built in."""
    out_specs: dict[bool, Any]
    bodies: dict[bool, fx.GraphModule]
    names: dict[bool, list[str | None]]
    elsewhere: dict[tuple[bool, torch.device], fx.GraphModule] = field(default_factory=dict)
    """The same on other devices than the CPU, as they are met."""

    def on(self, device: torch.device, *, training: bool) -> fx.GraphModule:
        """The body of a mode, for tensors of that device."""
        if device.type == "cpu":
            return self.bodies[training]
        if (training, device) not in self.elsewhere:
            self.elsewhere[training, device] = placed(self.bodies[training], device)
        return self.elsewhere[training, device]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bodies:
        return self


class GraphModel(nn.Module):
    """An nn.Module that runs exported graphs on its own parameters, which keep their original names.

    It has two bodies over one state: the train graph in train mode, the eval graph in eval mode. The bodies are pure
    functions of the state (flat calling convention), so `.to()`, `load_state_dict`, `deepcopy` and re-capture just work.
    Without a train graph the eval graph serves both, with batch norm and dropout switched on in train mode.
    """

    def __init__(
        self,
        eval_graph: ExportedProgram,
        train_graph: ExportedProgram | None,
        state: Mapping[str, Tensor],
        bodies: tuple[fx.GraphModule, fx.GraphModule | None] | None = None,
    ) -> None:
        """`bodies` replaces the graphs' own code (a rewrite with the same placeholders)."""
        super().__init__()
        body, train_body = bodies or (eval_graph.graph_module, train_graph.graph_module if train_graph else None)
        trainable = set(eval_graph.graph_signature.parameters)
        lifted = set(placeholder_names(eval_graph).values()) | (
            set(placeholder_names(train_graph).values()) if train_graph else set()
        )
        made: dict[int, nn.Parameter] = {}  # tied names keep one Parameter
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            if name in trainable:
                if id(tensor) not in made:
                    made[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
                owner.register_parameter(leaf, made[id(tensor)])
            elif name in lifted or isinstance(tensor, Tensor):
                persistent = name not in eval_graph.constants
                owner.register_buffer(leaf, tensor.detach(), persistent=persistent)
        self._pure = _Bodies(
            in_spec=eval_graph.call_spec.in_spec,
            wanted=_wanted(eval_graph),
            out_specs={
                False: eval_graph.call_spec.out_spec,
                True: (train_graph or eval_graph).call_spec.out_spec,  # auxiliary heads: more outputs in train mode
            },
            bodies={False: body, True: train_body or trainable_copy(body)},
            names={False: _flat_names(eval_graph), True: _flat_names(train_graph or eval_graph)},
        )
        self.__class__ = _with_signature(eval_graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The captured forward; keyword inputs in any order."""
        in_spec = self._pure.in_spec
        order = in_spec.child(1).context or []
        if set(order) == set(kwargs):
            kwargs = {name: kwargs[name] for name in order}
        leaves, got = pytree.tree_flatten((args, kwargs))
        if got != in_spec:
            msg = f"inputs must be as captured: {in_spec}. Got {got}."
            raise TypeError(msg)
        _refuse_other_inputs(leaves, self._pure.wanted)
        values = iter(leaves)
        flat = [next(values) if name is None else self._tensor(name) for name in self._pure.names[self.training]]
        body = self._pure.on(where(flat), training=self.training)
        return pytree.tree_unflatten(body(*flat), self._pure.out_specs[self.training])

    def _tensor(self, name: str) -> Tensor:
        owner: Any = self
        for part in name.split("."):
            owner = getattr(owner, part)
        return owner  # type: ignore[no-any-return]


def _with_signature(graph: ExportedProgram) -> type[GraphModel]:
    """GraphModel with the captured argument names in its signature: torch.export cannot free axes under **kwargs."""
    args_spec, kwargs_spec = graph.call_spec.in_spec.children()
    users = [str(n) for n in graph.graph_signature.user_inputs]
    plain = all(c.is_leaf() for c in args_spec.children())
    positional = users[: args_spec.num_children] if plain else [f"arg_{i}" for i in range(args_spec.num_children)]
    kinds = inspect.Parameter
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
    parameters += [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in positional]
    parameters += [kinds(name, kinds.KEYWORD_ONLY) for name in kwargs_spec.context or []]

    def forward(self: GraphModel, *args: Any, **kwargs: Any) -> Any:
        return GraphModel.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("GraphModel", (GraphModel,), {"forward": forward, "__doc__": GraphModel.__doc__})


def _wanted(graph: ExportedProgram) -> tuple[Any, ...]:
    """What each input must be: a tuple of sizes (None where free), or the constant that export built in."""
    sizes = {
        n.name: tuple(_known(s) for s in n.meta["val"].shape)
        for n in graph.graph.nodes
        if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)
    }
    specs = [s.arg for s in graph.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    return tuple(sizes[a.name] if a.name in sizes else getattr(a, "value", None) for a in specs)


def _known(size: Any) -> int | None:
    """A size that the graph fixes, None where it is free. A symbol fixed by the model's code stays a SymInt."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return None if known is None else int(known)


def _refuse_other_inputs(leaves: list[Any], wanted: tuple[Any, ...]) -> None:
    """The graphs hold sizes and flags of the capture as constants: other ones would be computed wrongly, in silence."""
    for number, (value, want) in enumerate(zip(leaves, wanted, strict=True)):
        got = tuple(value.shape) if isinstance(value, Tensor) else value
        if isinstance(value, Tensor) and isinstance(want, tuple):
            fits = len(want) == len(got) and all(w is None or w == s for w, s in zip(want, got, strict=True))
        else:
            fits = type(got) is type(want) and got == want
        if not fits:
            rule = tuple("any" if w is None else w for w in want) if isinstance(want, tuple) else repr(want)
            msg = f"input {number} must be {rule}, as captured. Got {got!r}. Capture the model again with this input."
            raise RejectedError(msg)


def _flat_names(graph: ExportedProgram) -> list[str | None]:
    names = placeholder_names(graph)
    return [names.get(n.name) for n in graph.graph.nodes if n.op == "placeholder"]


def trainable_copy(body: fx.GraphModule, *, dropout: bool = True, momentum: float | None = None) -> fx.GraphModule:
    """A copy of an eval body with batch norm (and dropout) in train mode; `momentum` replaces that of batch norm."""
    body = copy.deepcopy(body)
    for node in body.graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default:
            args = list(node.args)
            args[5] = True
            if momentum is not None:
                args[6] = momentum
            node.args = tuple(args)
        elif dropout and str(node.target) in (
            "aten.dropout.default",
            "aten.dropout_.default",
            "aten.feature_dropout.default",
            "aten.feature_dropout_.default",
        ):
            node.args = (*node.args[:2], True)
    body.recompile()
    return body


# ------------------------------------------------------------------------------------------------------------- inputs


def call_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as (args, kwargs): a tensor, a tuple or list of args, or {"args": …, "kwargs": …}.

    >>> call_inputs(torch.zeros(1))
    ((tensor([0.]),), {})
    """
    if isinstance(batch, Mapping) and batch and set(batch) <= {"args", "kwargs"}:
        args = batch.get("args", ())
        return (args,) if isinstance(args, Tensor) else tuple(args), dict(batch.get("kwargs", {}))
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def as_inputs(inputs: Any) -> Inputs:
    """What `capture` takes for inputs, as (args, kwargs) of copies on the CPU; raises RejectedError where it holds no tensor.

    >>> as_inputs(torch.zeros(2, 3)).args[0].shape
    torch.Size([2, 3])
    """
    if isinstance(inputs, Inputs):
        args, kwargs = inputs
    elif isinstance(inputs, Mapping) and set(inputs) <= {"args", "kwargs"} and inputs:
        args, kwargs = inputs.get("args", ()), inputs.get("kwargs", {})
        if isinstance(args, Tensor):
            args = (args,)
        if not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
            msg = f'inputs must be {{"args": tuple, "kwargs": dict}}. Got {type(args).__name__} and {type(kwargs).__name__}.'
            raise RejectedError(msg)
        args, kwargs = tuple(args), dict(kwargs)
    elif isinstance(inputs, tuple | list):
        args, kwargs = tuple(inputs), {}
    else:
        args, kwargs = (inputs,), {}
    if not any(isinstance(t, Tensor) for t in pytree.tree_leaves((args, kwargs))):
        msg = f'inputs must hold at least one tensor: a tensor, a tuple, or {{"args": …, "kwargs": …}}. Got {type(inputs).__name__}.'
        raise RejectedError(msg)
    return pytree.tree_map(lambda v: v.detach().clone().cpu() if isinstance(v, Tensor) else v, Inputs(args, kwargs))  # type: ignore[no-any-return]


def _batched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Inputs, str]:
    """The example with a batch of at least 2: torch.export specialises a length of 1."""
    first = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    if first.dim() == 0:
        return Inputs(args, kwargs), "fixed: the first input has no axes"
    length = first.shape[0]

    def repeat(value: Any) -> Any:
        if length == 1 and isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1:
            return value.repeat(2, *[1] * (value.dim() - 1))
        return value

    return pytree.tree_map(repeat, Inputs(args, kwargs)), "dynamic"


def _try_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run once in eval mode; on failure name the module and the shapes it saw."""
    seen: list[tuple[str, str, str]] = []
    hooks = []

    def note(name: str, kind: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            leaves = [t for t in pytree.tree_leaves((inputs, named)) if isinstance(t, Tensor)]
            seen.append((name, kind, ", ".join(_described(t) for t in leaves)))

        return hook

    model.eval()
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(note(name, type(module).__name__), with_kwargs=True))
    try:
        with torch.no_grad():
            model(*pytree.tree_map(_cloned, args), **pytree.tree_map(_cloned, kwargs))
    except Exception as error:
        name, kind, shapes = seen[-1] if seen else ("", type(model).__name__, "")
        msg = f"the example inputs must fit the model. Got {type(error).__name__}: {error} — in {name or 'the model'} ({kind}), which saw {shapes or 'no tensor'}."
        raise RejectedError(msg) from error
    finally:
        for handle in hooks:
            handle.remove()


def _described(tensor: Tensor) -> str:
    """Shape and dtype; torch's own fast path of a transformer hands nested tensors on, which have no shape."""
    shape = "nested" if tensor.is_nested else str(tuple(tensor.shape))
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


# ------------------------------------------------------------------------------------------------------------- export


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """torch's exporters (and loggers `names`) warn and log about their own internals; what matters is raised."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch", *names))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)


def _export_eval(
    model: nn.Module, original: Inputs, example: Inputs, batch: str
) -> tuple[ExportedProgram, Inputs, str]:
    if batch == "dynamic":
        try:
            graph = _export(model, example, dynamic=True)
        except Exception as error:
            batch = f"fixed: {_first_line(error)}"
        else:
            if _is_dynamic(graph):
                return graph, example, batch
            batch = "fixed: the model does not keep the batch free"
    try:
        return _export(model, original, dynamic=False), original, batch
    except Exception as error:
        raise _capture_error(error) from error


def _export_train(model: nn.Module, example: Inputs, batch: str) -> tuple[ExportedProgram | None, tuple[str, ...]]:
    modes = {m: m.training for m in model.modules()}
    model.train()
    drawn = _draws()
    try:
        graph = _export(model, example, dynamic=batch == "dynamic")
    except Exception as error:
        return None, (
            f"no train graph ({_first_line(error)}): training uses the eval graph, drop path and attention dropout are lost",
        )
    finally:
        for module, mode in modes.items():
            module.training = mode
    if _draws() != drawn:
        return graph, ("the train graph repeats one draw of Python's or numpy's random numbers for ever (LayerDrop?)",)
    return graph, ()


def _draws() -> tuple[Any, ...]:
    """The state of the generators whose numbers torch.export takes for constants."""
    _, words, position, *_ = np.random.get_state()  # noqa: NPY002 (the global generator is the one to watch)
    return random.getstate(), bytes(words), position  # type: ignore[arg-type]


def _part_constants(train_graph: ExportedProgram, eval_graph: ExportedProgram) -> None:
    """Rename constants of the train graph that are other tensors of the same name: both graphs count from lifted_tensor_0."""
    constants = train_graph.constants
    for spec in train_graph.graph_signature.input_specs:
        name = spec.target
        if spec.kind is not InputKind.CONSTANT_TENSOR or name is None or name not in eval_graph.constants:
            continue
        mine, other = constants[name], eval_graph.constants[name]
        if not (mine.dtype == other.dtype and torch.equal(mine, other)):
            spec.target = f"train_{name.replace('.', '_')}"
            constants[spec.target] = constants.pop(name)


def _export(model: nn.Module, inputs: Inputs, *, dynamic: bool) -> ExportedProgram:
    args, kwargs = inputs
    shapes = _free_batch(model, args, kwargs) if dynamic else None
    with torch.no_grad(), redirect_stderr(io.StringIO()), known_shapes():  # torch prints the whole graph where it fails
        graph = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    _inline_regions(graph)
    drop_dtype_checks(graph)
    return graph


def _free_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """dynamic_shapes for torch.export: axis 0 of every tensor as long as the first one's, by argument name."""
    length = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)).shape[0]
    bound = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda v: {0: Dim.AUTO} if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == length else None, bound
    )


def _is_dynamic(graph: ExportedProgram) -> bool:
    return any(isinstance(want, tuple) and want[:1] == (None,) for want in _wanted(graph))


def _time_first(graph: ExportedProgram, batch: str) -> tuple[str, ...]:
    """A note where axis 0 of the inputs, which is taken for the batch, is what attention or a recurrent op runs along."""
    for node in graph.graph.nodes:
        op = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
        first = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
        if not isinstance(first, Tensor) or first.dim() < 3:
            continue
        attends = op == "scaled_dot_product_attention" and _known(first.shape[-2]) is None
        if attends or (op in ("lstm", "gru", "rnn_tanh", "rnn_relu") and batch != "dynamic" and node.args[-1] is False):
            name = module_path(node) or op
            return (
                f"{name} runs along axis 0 of the inputs, which is taken for the batch: if that is time, what is said of one sample is said of a step; "
                "capture a wrapper that takes the batch first",
            )
    return ()


_AUTOCAST = "under autocast"


def _inline_regions(graph: ExportedProgram) -> None:
    """Replace higher-order regions (`with torch.no_grad()`, autocast) by their bodies: every op must be seen."""
    gm = graph.graph_module
    changed = False
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in (
            "wrap_with_set_grad_enabled",
            "wrap_with_autocast",
        ):
            continue
        position = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        body = getattr(gm, str(node.args[position].target))
        inner = dict(
            zip((n for n in body.graph.nodes if n.op == "placeholder"), node.args[position + 1 :], strict=True)
        )
        with gm.graph.inserting_before(node):
            out = gm.graph.graph_copy(body.graph, inner)
        for user in list(node.users):
            if user.target is not operator.getitem:
                continue
            user.replace_all_uses_with(out[user.args[1]])
            gm.graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
        changed = True
        gm.meta[_AUTOCAST] = gm.meta.get(_AUTOCAST, False) or node.target.__name__ == "wrap_with_autocast"
    if changed:
        gm.recompile()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def _capture_error(error: Exception) -> CaptureError:
    import traceback

    every = traceback.extract_tb(error.__traceback__)
    frames = [f for f in every if not any(part in f.filename for part in ("/torch/", "/paredown/"))]
    where = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    fix = "A branch or loop on tensor values cannot be captured: move it out of forward, or capture the part before it."
    if any(f.name == "_detect_is_causal_mask" for f in every):
        fix = "nn.Transformer looks into its masks unless it is told: pass tgt_is_causal (src_is_causal, memory_is_causal) too."
    return CaptureError(f"torch.export must be able to follow forward. Got {_first_line(error)}{where}. {fix}")


def _digest(graph: ExportedProgram, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(graph.graph_module.code.encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        data = tensor.detach().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()
