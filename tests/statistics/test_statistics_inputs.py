"""Statistics of inputs and outputs against hooks and explicit patches on nets with every kind of layer."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from paredown.errors import RejectedError, ResourceError, UsageError
from paredown.program import Program, capture
from paredown.statistics import InputStatistics, input_statistics, output_statistics
from paredown.statistics import inputs as inputs_module

CONVOLUTIONS = [
    (1, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    (1, {"kernel_size": 4, "padding": "same"}),
    (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    (2, {"kernel_size": 3, "groups": 2, "stride": 2}),
    (2, {"kernel_size": 3, "groups": 4, "padding": 1}),
    (3, {"kernel_size": (1, 2, 3), "padding": (0, 1, 1), "groups": 2}),
]


def state_hash(program: Program) -> str:
    digest = hashlib.sha256()
    for name, tensor in program.state.items():
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def compare(found: InputStatistics, rows: list[Tensor]) -> None:
    """`rows`: the inputs [positions, K] of every group, made without the code under test."""
    assert found.gram is not None
    for group, x in enumerate([r.double() for r in rows]):
        for got, wanted in (
            (found.means, x.mean(0)),
            (found.absolute_means, x.abs().mean(0)),
            (found.squared_norms, (x * x).mean(0)),
            (found.gram, x.T @ x / len(x)),
        ):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got[group], wanted, rtol=1e-6, atol=1e-6)
    assert len(found.means) == len(rows)
    assert found.num_positions == max(len(x) for x in rows)


def impulse_rows(layer: Any, x: Tensor) -> list[Tensor]:
    """The inputs of a convolution by its own arithmetic: with a one-hot filter its output is that input."""
    inner = layer.weight[0].numel()
    columns: list[list[Tensor]] = [[] for _ in range(layer.groups)]
    probe = type(layer)(
        layer.in_channels, layer.groups, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, bias=False
    )  # fmt: skip
    for k in range(inner):
        with torch.no_grad():
            probe.weight.zero_()
            probe.weight.reshape(layer.groups, -1)[:, k] = 1.0
            out = probe(x)
        for group in range(layer.groups):
            columns[group].append(out[:, group].reshape(-1))
    return [torch.stack(c, dim=1) for c in columns]


@pytest.mark.parametrize(("axes", "options"), CONVOLUTIONS)
def test_convolutions_of_all_kinds(axes: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes](4, 8, **options)
    x = torch.randn(5, 4, *(7, 6, 5)[:axes])
    program = capture(nn.Sequential(layer, nn.ReLU()).eval(), x, train=False)
    before = state_hash(program)
    found = input_statistics(program, ["0.weight"], [x[:2], x[2:]])["0.weight"]
    compare(found, impulse_rows(layer, x))
    plain = input_statistics(program, ["0.weight"], [x[:2], x[2:]], gram=False)["0.weight"]
    assert plain.gram is None
    assert plain.num_positions == found.num_positions
    torch.testing.assert_close(plain.squared_norms, found.squared_norms)
    torch.testing.assert_close(plain.absolute_means, found.absolute_means)
    torch.testing.assert_close(plain.means, found.means)
    # An identity that ties the view to the layer: mean of y² over positions and outputs is Σ_o w_o G w_oᵀ.
    with torch.no_grad():
        y = layer(x) - layer.bias.reshape(-1, *[1] * axes)
    weight = layer.weight.detach().double().reshape(layer.groups, 8 // layer.groups, -1)
    assert found.gram is not None
    energy = torch.einsum("gok,gkl,gol->go", weight, found.gram, weight).reshape(-1)
    torch.testing.assert_close(energy, y.double().square().movedim(1, 0).reshape(8, -1).mean(1), rtol=1e-5, atol=1e-6)
    assert state_hash(program) == before


class Attention(nn.Module):
    """Cross attention, a transposed product, a left product, a functional linear used twice, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.right = nn.Parameter(torch.randn(8, 6))
        self.left = nn.Parameter(torch.randn(3, 5))
        self.shared = nn.Parameter(torch.randn(6, 6))
        self.up = nn.ConvTranspose2d(2, 4, 2, groups=2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = self.attend(x, y, y, need_weights=False)[0]
        h = self.left @ (seen @ self.right)
        h = functional.linear(torch.relu(functional.linear(h, self.shared)), self.shared)
        return self.up(torch.stack([h, -h], dim=1))


def test_slices_products_shared_and_transposed_weights() -> None:
    torch.manual_seed(1)
    net = Attention().eval()
    x, y = torch.randn(4, 5, 8), torch.randn(4, 7, 8)
    names = ["attend.in_proj_weight", "right", "left", "shared", "up.weight"]
    found = input_statistics(capture(net, (x, y), train=False), names, [(x, y)])
    with torch.no_grad():
        seen = net.attend(x, y, y)[0]
        right = seen @ net.right
        left = net.left @ right
        second = torch.relu(left @ net.shared.T)
        up = second @ net.shared.T
    a, b = x.reshape(-1, 8), y.reshape(-1, 8)
    compare(found["attend.in_proj_weight"], [a, b, b])
    compare(found["right"], [seen.reshape(-1, 8)])
    assert found["right"].flipped
    compare(found["left"], [right.transpose(1, 2).reshape(-1, 5)])
    compare(found["shared"], [torch.cat([left.reshape(-1, 6), second.reshape(-1, 6)])])
    compare(found["up.weight"], [up.reshape(-1, 1), -up.reshape(-1, 1)])
    for name in names:
        shape = tuple(net.get_parameter(name).shape)
        assert found[name].along(found[name].squared_norms, shape).shape == shape


def test_values_lie_beside_the_weights_that_they_meet() -> None:
    """Scaling one input scales exactly the elements that read it."""
    net = nn.Conv2d(4, 6, 2, groups=2)
    x = torch.ones(2, 4, 5, 5)
    x[:, 3] = 3.0
    program = capture(net, x, train=False)
    seen = input_statistics(program, ["weight"], [x], gram=False)["weight"]
    beside = seen.along(seen.squared_norms, tuple(net.weight.shape))
    expected = torch.ones(6, 2, 2, 2)
    expected[3:, 1] = 9.0
    torch.testing.assert_close(beside.float(), expected)


def test_a_loss_calls_the_model_and_other_weights_can_be_given() -> None:
    torch.manual_seed(0)
    net, other = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
    x, labels = torch.randn(6, 3), torch.zeros(6, dtype=torch.long)
    program = capture(net, x, train=False)
    calls = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(batch)
        return functional.cross_entropy(model(batch[0]), batch[1])

    found = input_statistics(program, ["2.weight"], iter([(x, labels)] * 9), loss=loss, num_batches=2, module=other)
    compare(found["2.weight"], [torch.relu(other[0](x)).detach().repeat(2, 1)])
    assert len(calls) == 2


def test_tensors_that_change_in_place_are_seen_as_they_are_read() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h.mul_(2.0)
            return self.second(functional.relu_(h))

    torch.manual_seed(0)
    net = InPlace()
    x = torch.randn(8, 4)
    found = input_statistics(capture(net, x, train=False), ["second.weight"], [x])["second.weight"]
    compare(found, [torch.relu(2 * net.first(x)).detach()])


def test_outputs_behind_the_activation() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9, 3)).eval()
    net[1].running_mean.copy_(torch.linspace(-1, 1, 5))
    x = torch.randn(4, 2, 5, 5)
    found = output_statistics(capture(net, x, train=False), ["0.weight", "4.weight"], [x[:3], x[3:]])
    hidden = net[:3](x).detach().movedim(1, 0).reshape(5, -1)
    torch.testing.assert_close(found["0.weight"].zero_shares, (hidden == 0).double().mean(1))
    torch.testing.assert_close(found["0.weight"].absolute_means, hidden.abs().double().mean(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["0.weight"].squared_norms, hidden.double().square().mean(1), rtol=1e-5, atol=1e-7)
    assert found["0.weight"].activation == "relu"
    assert 0 < float(found["0.weight"].zero_shares.min()) < float(found["0.weight"].zero_shares.max())
    assert found["4.weight"].activation == "linear"
    torch.testing.assert_close(
        found["4.weight"].absolute_means, net(x).detach().abs().double().mean(0), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("which", [input_statistics, output_statistics])
def test_wrong_use_is_refused(which: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    program = capture(net, x, train=False)
    with pytest.raises(UsageError, match="those of the program"):
        which(program, ["3.weight"], [x])
    with pytest.raises(UsageError, match=r"1\.weight, which none reads"):
        which(program, ["1.weight"], [x])
    with pytest.raises(RejectedError, match="at least one batch"):
        which(program, ["0.weight"], [])
    with pytest.raises(RejectedError, match=r"0\.weight"):
        which(program, ["0.weight"], [x * float("nan")])
    with pytest.raises(RejectedError, match="call the model"):
        which(program, ["0.weight"], [x], loss=lambda model, batch: torch.zeros(()))


def test_gram_matrices_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "_GRAM_BYTES", 1000)
    x = torch.randn(2, 30)
    program = capture(nn.Linear(30, 2), x, train=False)
    with pytest.raises(ResourceError, match="weight, which has 30 inputs"):
        input_statistics(program, ["weight"], [x])
    assert input_statistics(program, ["weight"], [x], gram=False)["weight"].gram is None


class Token(nn.Module):
    """A class token, repeated for every sample: its place in the graph depends on the length of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.patch(x)], dim=1)
        return self.head((x + torch.relu(self.a(x)))[:, 0])


@pytest.mark.parametrize("find", [input_statistics, output_statistics])
def test_the_batch_of_a_program_stays_free(find: Any) -> None:
    """Looking for uses of the token once fixed the program's batch at the example's, in silence, for all that came after."""
    from paredown.statistics.uses import find_uses

    program = capture(Token(), torch.randn(2, 4, 6))
    find_uses(program, ["token", "patch.weight", "a.weight"])
    find(program, ["patch.weight", "a.weight"], [torch.randn(5, 4, 6)])
    assert all(
        node.meta["val"].shape[0].node.maybe_as_int() is None
        for node in program.eval_graph.graph.nodes
        if node.op == "placeholder" and node.name == "x"
    )
