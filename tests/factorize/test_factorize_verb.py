"""factorize: full rank is the layer itself, both realisers, what they cannot do, files, and other verbs after it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import forked
import paredown as pare
from paredown.errors import NothingToDo, RejectedError, UsageError, VerificationError
from paredown.plan import Plan, Rank
from paredown.prune.factors import found, most_ranks

Realiser = Any


def plan_of(**ranks: tuple[Any, ...]) -> Plan:
    """plan_of(conv__weight=("svd", 3)); two underscores are a dot."""
    return Plan(keep={}, ranks={n.replace("__", "."): Rank(method=r[0], ranks=r[1:]) for n, r in ranks.items()})


def full(program: pare.Program, name: str, method: str) -> Plan:
    layer = found(program).layer(name)
    return Plan(keep={}, ranks={name: Rank(method=method, ranks=most_ranks(layer.shape, layer.conv, method))})


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / a.detach().abs().max())


# ------------------------------------------------------------------------------------------- full rank, any convolution


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    ins, outs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "sizes", "sizes"]))
    if padding == "sizes":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(axes))
    stride = 1 if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(axes))
    bias = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 1000)))
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    conv = kind(
        ins,
        outs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=mode,
    )
    sizes = [draw(st.integers(6, 8)) for _ in range(axes)]
    return nn.Sequential(conv, nn.Tanh()), torch.randn(2, ins, *sizes)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(convolutions(), st.data())
def test_full_rank_is_the_convolution_itself(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    net, x = case
    methods = ["svd", "tucker2", *(["spatial_svd"] if x.dim() == 4 else [])]
    method = data.draw(st.sampled_from(methods))
    realiser = data.draw(st.sampled_from(["module", "graph"]))
    program = pare.capture(net, x)
    small = pare.factorize(program, full(program, "0.weight", method), realiser=realiser)  # type: ignore[arg-type]
    assert small.realiser == realiser
    other = torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        assert gap(net(other), small.module(other)) <= 1e-5
        assert gap(net.train()(other), small.module.train()(other)) <= 1e-5
    least = Rank(method=method, ranks=(1,) * (2 if method == "tucker2" else 1))
    assert pare.factorize(program, Plan(keep={}, ranks={"0.weight": least}), realiser=realiser).proof.moved > 0  # type: ignore[arg-type]


def test_a_truncated_layer_computes_with_the_truncated_weight() -> None:
    """Not only at full rank: the outputs are those of the dense class with its weight replaced by numpy's own SVD."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 10, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(160, 7))
    program = pare.capture(net, torch.zeros(2, 4, 8, 8))
    small = pare.factorize(program, plan_of(**{"0__weight": ("svd", 3), "3__weight": ("svd", 2)}))
    with torch.no_grad():
        for number, rank in ((0, 3), (3, 2)):
            weight: Tensor = net[number].weight  # type: ignore[assignment]
            u, s, vt = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
            weight.copy_((u[:, :rank] * s[:rank] @ vt[:rank]).reshape(weight.shape))
        x = torch.randn(3, 4, 8, 8)
        assert gap(net(x), small.module(x)) <= 1e-5


# ------------------------------------------------------------------------------------------------ what a model may hold


class Attention(nn.Module):
    """Weights that belong to no layer of their own, a transposed one, a shared one, and a reader of weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.table = nn.Parameter(torch.randn(16, 12) / 4)  # stored [in, out], as in GPT-2
        self.shift = nn.Parameter(torch.randn(12))
        self.one = nn.Linear(12, 12)
        self.two = nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x, x, x, need_weights=False)[0]
        y = torch.addmm(self.shift, x.reshape(-1, 16), self.table).view(x.shape[0], -1, 12) + x @ self.table
        return self.two(torch.relu(self.one(y)))  # type: ignore[no-any-return]


@functools.cache
def attention() -> tuple[pare.Program, Tensor]:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    return pare.capture(Attention(), x), x


def test_attention_bare_parameters_and_shared_weights_as_graphs() -> None:
    program, _ = attention()
    every = [*found(program).layers]
    assert every == ["table", "attend.in_proj_weight", "attend.out_proj.weight", "one.weight"]
    ranks: dict[str, Rank] = {}
    for name in every:
        ranks |= full(program, name, "svd").ranks
    small = pare.factorize(program, Plan(keep={}, ranks=ranks))
    assert small.realiser == "graph"
    other = torch.randn(4, 5, 16)
    assert gap(program.module(other), small.module(other)) <= 1e-5
    names = dict(small.module.named_parameters(remove_duplicate=False))
    assert names["one.0.weight"] is names["two.0.weight"]
    assert names["attend.in_proj_weight.1.weight"].shape == (48, 16)
    assert names["table.0.weight"].shape == (12, 16)
    small.module.train()(other).sum().backward()
    assert all(p.grad is not None for p in small.module.parameters())


def test_shared_weights_in_the_class_share_their_factors() -> None:
    program, _ = attention()
    small = pare.factorize(program, plan_of(two__weight=("svd", 3)))  # by its second name
    assert small.realiser == "module"
    assert small.plan.ranks == {"one.weight": Rank(method="svd", ranks=(3,))}
    assert type(small.module).__name__ == "Attention"
    one, two = small.module.get_submodule("one"), small.module.get_submodule("two")
    assert one[0].weight is two[0].weight  # type: ignore[index]
    assert one[1].bias is not two[1].bias  # type: ignore[index]
    with pytest.raises(UsageError, match="given ranks once"):
        pare.factorize(program, plan_of(one__weight=("svd", 3), two__weight=("svd", 3)))


def test_the_class_is_kept_only_where_it_calls_the_layer() -> None:
    program, _ = attention()
    plan = plan_of(attend__out_proj__weight=("svd", 4))  # the class reads out_proj.weight
    assert pare.factorize(program, plan).realiser == "graph"
    with pytest.raises(VerificationError, match=r"must call its layers as modules. Got AttributeError"):
        pare.factorize(program, plan, realiser="module")


class Backwards(nn.Module):
    """A layer that is read only, and the other way round (a decoder tied to its encoder)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Linear(64, 16)
        self.dec = nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.enc(x)) @ self.dec.weight


def test_a_layer_whose_weight_multiplies_from_the_other_side_becomes_a_graph() -> None:
    x = torch.randn(3, 64)
    program = pare.capture(Backwards(), x)
    small = pare.factorize(program, full(program, "dec.weight", "svd"))
    assert small.realiser == "graph"
    assert gap(program.module(x), small.module(x)) <= 1e-5
    with pytest.raises(VerificationError, match="Use the graph realiser"):
        pare.factorize(program, plan_of(dec__weight=("svd", 3)), realiser="module")


class Peeking(nn.Module):
    """Computes something else where a layer is not the class that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if isinstance(self.layer, nn.Linear) or self.training else -self.layer(x)


class PeekingInTraining(Peeking):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if isinstance(self.layer, nn.Linear) or not self.training else -self.layer(x)


@pytest.mark.parametrize("kind", [Peeking, PeekingInTraining])
def test_a_class_that_computes_something_else_is_found_out(kind: type[nn.Module]) -> None:
    program = pare.capture(kind(), torch.randn(2, 8))
    small = pare.factorize(program, plan_of(layer__weight=("svd", 2)))
    assert small.realiser == "graph"
    with pytest.raises(VerificationError):
        pare.factorize(program, plan_of(layer__weight=("svd", 2)), realiser="module")


def test_a_layer_with_a_hook_is_not_replaced_in_the_class() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    net[0].register_forward_hook(lambda _m, _i, out: out * 2)
    x = torch.randn(3, 8)
    program = pare.capture(net, x)
    small = pare.factorize(program, full(program, "0.weight", "svd"))
    assert small.realiser == "graph"
    assert gap(net(x), small.module(x)) <= 1e-5


class Readers(nn.Module):
    """Weights with a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9)
        self.head.weight = self.embed.weight
        self.up = nn.Linear(8, 8)
        self.left = nn.Parameter(torch.randn(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.linear(self.up(self.embed(ids)), self.up.weight.T)
        return self.left @ self.head(x)  # type: ignore[no-any-return]


def test_weights_that_something_else_reads_are_refused_with_the_reason() -> None:
    program = pare.capture(Readers(), torch.zeros(2, 4, dtype=torch.int64))
    every = found(program)
    assert not every.layers
    for name, said in (
        ("head.weight", "embedding reads it"),
        ("embed.weight", "embedding reads it"),
        ("up.weight", "both orientations"),
        ("left", "matmul reads it"),
        ("nobody.weight", "no such weight"),
    ):
        with pytest.raises(UsageError, match=said):
            pare.factorize(program, Plan(keep={}, ranks={name: Rank(method="svd", ranks=(1,))}))


def test_plans_that_do_not_fit_are_refused() -> None:
    program, _ = attention()
    with pytest.raises(NothingToDo, match="must hold ranks"):
        pare.factorize(program, Plan(keep={}))
    with pytest.raises(UsageError, match=r"ranks alone. Got keep"):
        pare.factorize(
            program, Plan(keep={"one.weight": {0: (0,)}}, ranks={"one.weight": Rank(method="svd", ranks=(1,))})
        )
    with pytest.raises(UsageError, match="must be given batches"):
        pare.factorize(program, plan_of(one__weight=("svd_llm", 2)))
    with pytest.raises(UsageError, match="realiser must be"):
        pare.factorize(program, plan_of(one__weight=("svd", 2)), realiser="magic")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be a Program or a Pruned"):
        pare.factorize(Attention(), plan_of(one__weight=("svd", 2)))  # type: ignore[arg-type]


def test_weights_with_nan_are_refused() -> None:
    program, _ = attention.__wrapped__()  # one of its own
    with torch.no_grad():
        program.state["one.weight"][0, 0] = torch.nan  # after capture, which refuses it too
    with pytest.raises(RejectedError, match=r"weights of one.weight must be finite"):
        pare.factorize(program, plan_of(one__weight=("svd", 2)))


def test_frozen_weights_stay_frozen_and_half_precision_stays_half() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(torch.bfloat16)
    net[0].requires_grad_(False)
    program = pare.capture(net, torch.randn(2, 16, dtype=torch.bfloat16))
    small = pare.factorize(program, plan_of(**{"0__weight": ("svd", 3), "2__weight": ("svd", 2)}))
    flags = {n: p.requires_grad for n, p in small.module.named_parameters()}
    assert small.realiser == "module"
    assert flags == {
        "0.0.weight": False,
        "0.1.weight": False,
        "0.1.bias": False,
        "2.0.weight": True,
        "2.1.weight": True,
        "2.1.bias": True,
    }
    assert {p.dtype for p in small.module.parameters()} == {torch.bfloat16}


def test_the_program_and_the_users_model_are_not_touched() -> None:
    model = Attention()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x = torch.randn(2, 5, 16)
    program = pare.capture(model, x)
    digest = program.eval_graph.graph_module.code
    small = pare.factorize(program, plan_of(one__weight=("svd", 3), table=("svd", 3)))
    with torch.no_grad():
        for parameter in small.module.parameters():
            parameter.zero_()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert all(torch.equal(t, program.state[n]) for n, t in before.items())
    assert program.eval_graph.graph_module.code == digest
    assert program.batch == "dynamic"


# --------------------------------------------------------------------------------------------- with the other verbs


class Small(nn.Module):
    """A network for all verbs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.two = nn.Conv2d(16, 24, 3, padding=1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.norm(self.one(x)))))
        return self.head(torch.relu(self.deep(x)).mean((2, 3)))  # type: ignore[no-any-return]


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RANKS = {"two__weight": ("tucker2", 3, 4), "deep__weight": ("spatial_svd", 1), "head__weight": ("svd", 4)}
SOURCE = Path(__file__).read_text(encoding="utf-8")


def pruned(program: pare.Program, share: float) -> pare.Pruned:
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, "l1")
    return pare.prune(
        program, pare.allocate(coupling, scores, pare.examine(program), pare.Budget(channels=share), align=1)
    )


@functools.cache
def dense() -> pare.Program:
    return pare.capture(Small(), IMAGES)


@functools.cache
def factorized(realiser: Realiser) -> pare.Pruned:
    return pare.factorize(dense(), plan_of(**RANKS), realiser=realiser)


@functools.cache
def pruned_then_factorized(realiser: Realiser) -> pare.Pruned:
    return pare.factorize(pruned(dense(), 0.5), plan_of(**RANKS), realiser=realiser)


@functools.cache
def pruned_factorized_and_pruned(realiser: Realiser) -> pare.Pruned:
    first = pruned_then_factorized(realiser)
    return pare.compose(first, pruned(pare.capture(first.module, IMAGES), 0.6))


WAYS: list[Callable[[Realiser], pare.Pruned]] = [factorized, pruned_then_factorized, pruned_factorized_and_pruned]


def test_saved_and_loaded_in_another_process(tmp_path: Path) -> None:
    wanted = {}
    for way in WAYS:
        for realiser in ("module", "graph"):
            small = way(realiser)
            assert small.realiser == realiser
            name = f"{way.__name__}-{realiser}"
            pare.save(small, tmp_path / name)
            kind = "Small" if realiser == "module" else "GraphModel"
            wanted[name] = (kind, sum(p.numel() for p in small.module.parameters()))
            with torch.no_grad():
                save_file({"x": IMAGES, "y": small.module(IMAGES)}, tmp_path / f"{name}.safetensors")
    body = SOURCE[SOURCE.index("class Small(") : SOURCE.index("IMAGES = ")]
    code = (
        "import json, torch\nfrom torch import Tensor, nn\nfrom safetensors.torch import load_file\nimport paredown as pare\n"
        f"{body}\nout = {{}}\nfor name in {list(wanted)!r}:\n"
        f"    io = load_file({str(tmp_path)!r} + '/' + name + '.safetensors')\n"
        f"    model = pare.load({str(tmp_path)!r} + '/' + name, Small())\n"
        "    error = float((model(io['x']) - io['y']).detach().abs().max())\n"
        "    out[name] = type(model).__name__, sum(p.numel() for p in model.parameters()), error\n"
        "print(json.dumps(out))\n"
    )
    done = forked.run(code)
    assert done.returncode == 0, done.stderr
    for name, (kind, count, error) in json.loads(done.stdout).items():
        assert (kind, count) == wanted[name]
        assert error <= 1e-6


def test_composed_results_tell_their_stages_and_shrink() -> None:
    counts = [sum(p.numel() for p in way("module").module.parameters()) for way in WAYS]
    assert counts[0] > counts[1] > counts[2]
    last = pruned_factorized_and_pruned("module")
    assert [bool(s.plan.ranks) for s in last.stages] == [False, True, False]
    assert set(last.plan.ranks) == {"two.weight", "deep.weight", "head.weight"}
    assert last.plan.keep["two.0.weight"]


def test_recover_trains_the_factors() -> None:
    small = factorized("auto")
    target = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    tuned = pare.recover(small, lambda: [(IMAGES, target)] * 8, step=step, epochs=2, lr=0.05)
    before, after = (float(step(m, (IMAGES, target)).detach()) for m in (small.module, tuned.module))
    assert after < before
    assert not torch.equal(tuned.module.get_parameter("two.0.weight"), small.module.get_parameter("two.0.weight"))
    assert isinstance(tuned, pare.Pruned)


@pytest.mark.parametrize("realiser", ["module", "graph"])
def test_quantized_and_exported_it_runs_as_int8(realiser: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("onnxruntime")
    small = factorized(realiser)
    calibrate = [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    quantized = pare.quantize(small, calibrate=calibrate)
    assert {"two.0.weight", "two.1.weight", "two.2.weight", "deep.0.weight", "head.1.weight"} <= set(quantized.weights)
    artifact = pare.export(quantized, tmp_path / "small.onnx")
    samples = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    check = pare.check(artifact, quantized, samples)
    assert len(check.int8_nodes) >= 7
    with torch.no_grad():
        a, b = small.module(samples).flatten(), quantized.module(samples).flatten()
    assert float(F.cosine_similarity(a, b, dim=0)) > 0.98
    plain = pare.export(small, tmp_path / "float.onnx")
    assert pare.check(plain, small, samples).max_error < 1e-4
