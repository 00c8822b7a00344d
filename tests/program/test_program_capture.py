"""Capture: what comes in, what is refused and how it is said, and that the user's model stays as it was."""

from __future__ import annotations

import copy
import inspect
import random as python_random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hazards import HAZARDS, Net, built, conv, fresh, random
from oracle import captured as shared
from oracle import changed, digest, distance, floats, plain, run, scale
from paredown.errors import CaptureError, RejectedError
from paredown.program import GraphModel, Program, capture, placeholder_names

NAMES = sorted(HAZARDS)


def graph_model(program: Program) -> GraphModel:
    return GraphModel(program.eval_graph, program.train_graph, dict(program.state)).eval()


# ------------------------------------------------------------------------------------------------------------- batch


def test_the_batch_is_free_also_from_an_example_of_one() -> None:
    for batch in (1, 2, 4):
        program = capture(fresh("residual"), random(batch, 3, 8, 8))
        assert program.batch == "dynamic"
        for other in (1, 2, 7):
            x = random(other, 3, 8, 8)
            assert distance(floats(graph_model(program)(x)), floats(built("residual")(x))) < 1e-5


def test_a_model_that_fixes_its_batch_is_captured_fixed_and_says_why() -> None:
    net = Net(lambda m, x: m.a(x.reshape(2, 15)), a=nn.Linear(15, 3))
    program = capture(net, random(2, 3, 5))
    assert program.batch.startswith("fixed: ")
    assert len(program.batch) > len("fixed: ")
    x = random(2, 3, 5)
    assert torch.equal(graph_model(program)(x), net(x))


def test_a_fixed_batch_can_be_asked_for() -> None:
    program = capture(fresh("residual"), random(1, 3, 8, 8), dynamic_batch=False)
    assert program.batch.startswith("fixed")
    assert graph_model(program)(random(1, 3, 8, 8)).shape == (1, 4, 8, 8)


# ------------------------------------------------------------------------------------- the captured model is the model


@pytest.mark.parametrize("name", NAMES)
def test_the_captured_graphs_compute_what_the_module_computes(name: str) -> None:
    hazard, model = HAZARDS[name], built(name)
    program, _ = shared(name)  # where it is asserted that capture leaves the model alone
    before = digest(model)
    captured = graph_model(program)
    for batch in (2, 3) if program.batch == "dynamic" else (2,):
        inputs = hazard.inputs(batch)
        expected = run(model, inputs)
        assert distance(run(captured, inputs), expected) <= 1e-5 * scale(expected)
    trained, reference = copy.deepcopy(captured).train(), plain(model).train()
    inputs = hazard.inputs(3 if program.batch == "dynamic" else 2)
    if hazard.stochastic:
        assert distance(run(trained, inputs, 1), run(trained, inputs, 2)) > 1e-3
    else:
        expected = run(reference, inputs)
        assert distance(run(trained, inputs), expected) <= 1e-5 * scale(expected)
        for n, b in reference.named_buffers():
            assert n not in dict(trained.named_buffers()) or torch.allclose(trained.get_buffer(n), b, atol=1e-5)
    assert digest(model) == before
    run(model, hazard.inputs(2))  # the user's own model still works


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_counters_are_left_alone(training: bool) -> None:
    model = fresh("dropouts").train(training)
    model.norm.training = not training  # type: ignore[union-attr,assignment]
    before = digest(model)
    capture(model, random(2, 3, 8, 8))
    assert digest(model) == before
    assert int(model.norm.num_batches_tracked) == 0  # type: ignore[union-attr,arg-type]


def test_nothing_is_shared_with_the_users_model() -> None:
    model, (program, _) = built("residual"), shared("residual")
    theirs = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not theirs & {t.data_ptr() for t in program.state.values()}
    assert not theirs & {t.data_ptr() for t in program.module.parameters()}


@pytest.mark.parametrize("name", ["residual", "fused_qkv", "group_norm", "dropouts"])
def test_the_graphs_are_those_of_torch_export(name: str) -> None:
    """Also where torch remembers the shapes that ops gave, as it does outside of these tests (conftest.py)."""
    program, _ = shared(name)
    for training, graph in ((False, program.eval_graph), (True, program.train_graph)):
        args, model = program.inputs.args, fresh(name).train(training)
        with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=True):
            other = torch.export.export(model, args, dynamic_shapes=({0: torch.export.Dim.AUTO},))
        assert graph is not None
        assert graph.graph_module.code == other.graph_module.code
        for mine, theirs in zip(graph.graph.nodes, other.graph.nodes, strict=True):
            assert str(mine.meta.get("val")) == str(theirs.meta.get("val")), mine


def test_a_change_of_what_tests_share_is_noticed() -> None:
    """Each test is followed by this look (conftest.py): programs are captured once for all tests of a net."""
    program, _ = shared("residual")
    tensor, node = program.state["stem.weight"], next(iter(program.eval_graph.graph.nodes))
    before = tensor.detach().clone()
    assert changed("residual") == []
    with torch.no_grad():
        tensor[0] += 1e-3
    assert changed("residual") == ["residual"]
    with torch.no_grad():
        tensor.copy_(before)
    node.meta["note"] = 1
    assert changed("residual") == ["residual"]
    del node.meta["note"]
    assert changed("residual") == []


def test_tied_names_share_one_tensor() -> None:
    program, _ = shared("tied_convolutions")
    assert program.state["2.weight"].data_ptr() == program.state["4.weight"].data_ptr()
    model = graph_model(program)
    assert model.get_parameter("2.weight") is model.get_parameter("4.weight")
    assert len({id(p) for p in model.parameters()}) == len(list(fresh("tied_convolutions").parameters()))


def test_every_placeholder_has_its_name_in_the_state() -> None:
    for name in ("residual", "buffers_added", "dropouts", "window_attention"):
        program, _ = shared(name)
        for graph in (program.eval_graph, program.train_graph):
            assert graph is not None
            assert set(placeholder_names(graph).values()) <= set(program.state)
        mine = set(graph_model(program).state_dict())
        assert set(fresh(name).state_dict()) <= mine


def test_state_dict_keys_are_the_users_and_load_strictly() -> None:
    model = fresh("dropouts")
    captured = graph_model(capture(model, random(2, 3, 8, 8)))
    assert list(captured.state_dict()) == list(model.state_dict()) or set(captured.state_dict()) == set(
        model.state_dict()
    )
    captured.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(captured.state_dict(), strict=True)


def test_train_mode_is_real_and_counts_batches() -> None:
    model = graph_model(capture(fresh("dropouts"), random(2, 3, 8, 8))).train()
    before = model.get_buffer("norm.running_mean").clone()
    run(model, HAZARDS["dropouts"].inputs(4))
    assert int(model.get_buffer("norm.num_batches_tracked")) == 1
    assert bool((model.get_buffer("norm.running_mean") != before).any())


def test_a_copy_moves_alone() -> None:
    model = graph_model(capture(fresh("dropouts"), random(2, 3, 8, 8)))
    other = copy.deepcopy(model).train().double()
    run(other, ((random(4, 3, 8, 8).double(),), {}))
    assert model.get_parameter("stem.weight").dtype == torch.float32
    assert int(model.get_buffer("norm.num_batches_tracked")) == 0
    assert not model.training


def test_a_captured_model_can_be_captured_again_with_a_free_batch() -> None:
    for name in ("residual", "dict_output", "keyword_inputs", "several_inputs", "auxiliary_head"):
        args, kwargs = HAZARDS[name].inputs(2)
        first = graph_model(shared(name)[0])
        program = capture(first, {"args": args, "kwargs": kwargs})
        assert program.batch == "dynamic"
        assert set(program.state) == set(first.state_dict())
        assert program.train_graph is not None
        inputs = HAZARDS[name].inputs(5)
        assert distance(run(graph_model(program), inputs), run(fresh(name), inputs)) < 1e-5


def test_a_head_of_train_mode_only_is_in_the_train_graph() -> None:
    model = graph_model(shared("auxiliary_head")[0])
    assert isinstance(model(random(3, 3, 8, 8)), Tensor)
    out, aux = model.train()(random(3, 3, 8, 8))
    assert (out.shape, aux.shape) == ((3, 3, 8, 8), (3, 2, 8, 8))


def test_constants_of_the_two_modes_are_told_apart() -> None:
    def run_(m: Any, x: Tensor) -> Tensor:
        return m.a(x) * (torch.tensor([1.0, 2.0]) if m.training else torch.tensor([5.0, 7.0]))

    net = Net(run_, a=nn.Linear(3, 2))
    model, x = graph_model(capture(net, random(2, 3))), random(4, 3)
    for mode in (False, True):
        assert torch.allclose(model.train(mode)(x), net.train(mode)(x))


def test_keyword_inputs_in_any_order_and_outputs_in_their_structure() -> None:
    program = capture(fresh("keyword_inputs"), {"kwargs": {"features": True, "x": random(2, 6, 5)}})
    out = graph_model(program)(x=random(3, 6, 5), features=True)
    assert set(out) == {"logits", "features"}
    args, _ = HAZARDS["none_in_output"].inputs(2)
    out = graph_model(capture(fresh("none_in_output"), args))(random(3, 6, 5))
    assert out[1] is None
    assert out[2]["aux"][0] is None


@pytest.mark.parametrize("name", ["residual", "dict_output", "several_inputs"])
def test_other_sizes_and_flags_than_the_captured_ones_are_refused(name: str) -> None:
    """Sizes are constants in the graph: a mean over 64 pixels would be taken of 100."""
    args, kwargs = HAZARDS[name].inputs(2)
    model = graph_model(shared(name)[0])
    larger = [torch.cat([a, a], -1) for a in args]
    with pytest.raises(RejectedError, match="as captured"):
        model(*larger, **kwargs)


def test_flags_are_built_in() -> None:
    model = graph_model(capture(fresh("keyword_inputs"), {"kwargs": {"features": True, "x": random(2, 6, 5)}}))
    with pytest.raises(RejectedError, match=r"True.*False"):
        model(x=random(2, 6, 5), features=False)
    model = graph_model(capture(fresh("dict_output"), {"args": (random(2, 6, 5),), "kwargs": {"scale": None}}))
    assert set(model(random(3, 6, 5), scale=None)) == {"logits"}
    with pytest.raises(RejectedError, match="None"):
        model(random(2, 6, 5), scale=random(2, 6, 1))


def test_a_fixed_batch_is_not_run_at_another_size() -> None:
    program = capture(fresh("residual"), random(2, 3, 8, 8), dynamic_batch=False)
    with pytest.raises(RejectedError, match="as captured"):
        graph_model(program)(random(3, 3, 8, 8))


def test_regions_without_gradient_are_inlined() -> None:
    def run_(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(m.gate(x))
        with torch.autocast("cpu", enabled=False):
            y = m.a(x)
        return m.b(y * gate)

    net = Net(run_, a=nn.Linear(5, 6), gate=nn.Linear(5, 6), b=nn.Linear(6, 2))
    program = capture(net, random(3, 5))
    names = {
        str(getattr(n.target, "__name__", n.target)) for n in program.eval_graph.graph.nodes if n.op == "call_function"
    }
    assert not any(n.startswith("wrap_with") for n in names)
    assert torch.allclose(graph_model(program)(random(4, 5)), net(random(4, 5)))


def test_the_digest_is_that_of_the_model() -> None:
    x = random(2, 3, 8, 8)
    assert capture(fresh("residual"), x).source_digest == capture(fresh("residual"), x).source_digest
    other = fresh("residual")
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1e-3
    assert capture(other, x).source_digest != capture(fresh("residual"), x).source_digest


# ----------------------------------------------------------------------------------------------- unwrapping, folding


def test_wrappers_come_off_and_are_noted() -> None:
    plain_program = capture(fresh("residual"), random(2, 3, 8, 8))
    for wrap in (torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))):
        program = capture(wrap(fresh("residual")), random(2, 3, 8, 8))
        assert set(program.state) == set(plain_program.state)
        assert any("unwrapped" in n for n in program.notes)


@pytest.mark.parametrize(
    ("name", "said"), [("weight_norms", "0.weight"), ("spectral_norms", "0.weight"), ("pruning_mask", "2.weight")]
)
def test_computed_weights_are_folded_and_noted(name: str, said: str) -> None:
    model = fresh(name)
    expected = run(model, HAZARDS[name].inputs(3))
    program = capture(model, HAZARDS[name].inputs(2)[0])
    assert any("folded" in n and said in n for n in program.notes)
    assert said in program.state
    assert not any("parametrizations" in n or n.endswith(("_orig", "_mask", "_g", "_v")) for n in program.state)
    assert distance(run(model, HAZARDS[name].inputs(3)), expected) == 0, "the user's model must still run"
    masked = program.state["2.weight"]
    assert name != "pruning_mask" or bool((masked == 0).any())


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_named(bad: float) -> None:
    model = fresh("residual")
    with torch.no_grad():
        model.b.weight[0, 0, 0, 0] = bad  # type: ignore[union-attr,index]
        model.norm.running_var[1] = bad  # type: ignore[union-attr,index]
    with pytest.raises(RejectedError, match=r"b\.weight.*norm\.running_var") as error:
        capture(model, random(2, 3, 8, 8))
    assert error.value.exit_code == 3
    assert "head.weight" not in str(error.value)


def test_complex_weights_are_refused() -> None:
    net = Net(lambda m, x: (x * m.w).real, w=nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    with pytest.raises(RejectedError, match=r"complex.*\bw\b"):
        capture(net, random(2, 3))


def test_half_and_double_weights_are_kept() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        program = capture(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype), random(2, 5).to(dtype))
        assert {t.dtype for t in program.state.values()} == {dtype}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (random(2, 4, 8, 8), ["4, 8, 8", "stem", "Conv2d"]),
        (random(2, 3, 8, 8).double(), ["float64", "stem"]),
        ((random(2, 3, 8, 8), random(2)), ["forward"]),
    ],
)
def test_inputs_that_do_not_fit_name_the_module_and_the_shapes(inputs: Any, words: list[str]) -> None:
    with pytest.raises(RejectedError) as error:
        capture(fresh("residual"), inputs)
    for word in words:
        assert word in str(error.value)


def test_a_late_misfit_names_the_late_module() -> None:
    with pytest.raises(RejectedError, match=r"4 \(Linear\).*2, 96"):
        capture(
            nn.Sequential(conv(3, 6), nn.ReLU(), nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(95, 3)),
            random(2, 3, 8, 8),
        )


@pytest.mark.parametrize("inputs", [3, "x", {"args": 3}, (), {"kwargs": {}}, {"args": (1,)}])
def test_inputs_without_a_tensor_are_refused(inputs: Any) -> None:
    with pytest.raises(RejectedError, match="inputs must"):
        capture(fresh("residual"), inputs)


def test_a_branch_on_values_gives_the_users_line() -> None:
    def run_(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if y.sum() > 0:
            y = F.relu(y)
        return y

    lines, start = inspect.getsourcelines(run_)
    line = start + next(i for i, text in enumerate(lines) if "y.sum()" in text)
    with pytest.raises(CaptureError, match=rf"test_program_capture\.py:{line}\b") as error:
        capture(Net(run_, a=nn.Linear(3, 2)), random(2, 3))
    assert error.value.exit_code == 3


def test_what_is_not_a_plain_module_is_refused() -> None:
    with pytest.raises(RejectedError, match="TorchScript"):
        capture(torch.jit.script(nn.Linear(3, 2)), random(2, 3))
    with pytest.raises(RejectedError, match=r"nn\.Module"):
        capture(lambda x: x, random(2, 3))  # type: ignore[arg-type]
    with pytest.raises(RejectedError, match=r"lazy|initialised"):
        capture(nn.LazyLinear(3), random(2, 3))


def test_a_model_that_refuses_to_be_copied_is_told_so() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    with pytest.raises(RejectedError, match="deepcopy"):
        capture(Stubborn(3, 2), random(2, 3))


def test_models_without_parameters_or_with_one_layer_work() -> None:
    assert capture(nn.Linear(3, 2), random(2, 3)).batch == "dynamic"
    program = capture(nn.ReLU(), random(2, 3))
    assert program.state == {}
    assert torch.equal(graph_model(program)(random(4, 3)), F.relu(random(4, 3)))


def test_video_and_integer_inputs_work() -> None:
    assert capture(fresh("conv_3d"), random(1, 2, 4, 6, 6)).batch == "dynamic"
    assert capture(fresh("tied_embedding"), HAZARDS["tied_embedding"].inputs(1)[0]).batch == "dynamic"


def test_a_train_graph_that_cannot_be_made_is_noted() -> None:
    def run_(m: Any, x: Tensor) -> Tensor:
        y = m.drop(m.a(x))
        return F.relu(y) if m.training and bool(y.sum() > 0) else y

    program = capture(Net(run_, a=nn.Linear(5, 4), drop=nn.Dropout(0.5)), random(2, 5))
    assert program.train_graph is None
    assert any("no train graph" in n for n in program.notes)
    model = graph_model(program).train()
    x = random(8, 5)
    assert distance(run(model, ((x,), {}), 1), run(model, ((x,), {}), 2)) > 1e-3


def test_randomness_of_python_is_not_baked_in_silently() -> None:
    """LayerDrop: the train graph would keep one draw for ever. It must be noticed."""

    def run_(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) if m.training and python_random.random() < 0.5 else y

    notes = set()
    for seed in range(6):
        python_random.seed(seed)
        notes |= set(capture(Net(run_, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), random(2, 4)).notes)
    assert any("random" in n for n in notes)


def test_a_transformer_that_looks_into_its_mask_is_told_how_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    x, mask = torch.randn(2, 3, 8), nn.Transformer.generate_square_subsequent_mask(3)
    with pytest.raises(CaptureError, match="pass tgt_is_causal"):
        capture(model, {"args": (x, x), "kwargs": {"tgt_mask": mask}})
    assert capsys.readouterr().err == ""  # torch prints the whole graph there
    program = capture(model, {"args": (x, x), "kwargs": {"tgt_mask": mask, "tgt_is_causal": True}})
    assert program.batch == "dynamic"


def test_padding_masks_of_an_encoder_go_the_way_of_nested_tensors() -> None:
    """In eval mode torch packs what is not padded into a tensor without a shape; capture looks at what modules see."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    model = Net(lambda m, x: m.encoder(x, src_key_padding_mask=x[..., 0] > 0.9), encoder=encoder).eval()
    x = random(2, 5, 8)
    x[..., 0] = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.0])
    program = capture(model, x)
    assert program.batch == "dynamic"
    expected = model(x)  # with gradients: the plain way
    assert float((graph_model(program)(x) - expected)[:, :4].abs().max()) <= 1e-5
