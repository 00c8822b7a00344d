from __future__ import annotations

import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import forked
from paredown.errors import Interrupted, MissingError, RejectedError, ResourceError, UsageError
from paredown.program import GraphModel, capture
from paredown.train import Hook, Progress, Training, fit
from paredown.train.checkpoint import state_digest
from paredown.train.task import stream


def net(*, dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(64, 3)
    )  # fmt: skip


def samples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.randint(3, (count,), generator=generator)


X, Y = samples(48)


def batches():
    """Shuffled and noisy, from the global generator, as a user's generator is."""
    for index in torch.split(torch.randperm(len(X)), 12):
        yield X[index] + 0.1 * torch.randn(len(index), 1, 6, 6), Y[index]


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def same(a: nn.Module, b: nn.Module) -> bool:
    return state_digest(a) == state_digest(b)


def stop_at(epoch: int, done: int, error: BaseException) -> Hook:
    """Raises after `done` steps of an epoch (0-based), once."""
    armed = [True]
    count = [0, 0]

    def after_step(training: Training) -> None:
        count[:] = [count[0] + 1 if count[1] == training.epoch else 1, training.epoch]
        if armed[0] and training.epoch == epoch and count[0] == done:
            armed[0] = False
            raise error

    return Hook(name="stop", after_step=after_step)


def test_fit_equals_a_plain_torch_loop_bit_for_bit():
    fitted = fit(net(), batches, step, epochs=2, lr=0.05, seed=5).module

    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.5 * (1 + torch.cos(torch.tensor(t * torch.pi / 8, dtype=torch.float64)).item())
    )
    for epoch in range(2):
        torch.manual_seed(stream(5, epoch))
        for batch in batches():
            optimizer.zero_grad()
            step(model, batch).backward()
            optimizer.step()
            scheduler.step()
    for (name, mine), theirs in zip(fitted.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7, msg=name)
    assert not same(fitted, net())


def test_cosine_schedule_is_torchs():
    rates = []
    hook = Hook(name="rates", after_step=lambda t: rates.append(t.optimizer.param_groups[0]["lr"]))
    fit(net(), batches, step, epochs=3, lr=0.1, hooks=[hook])
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    expected = []
    for _ in range(12):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-9)
    assert rates[0] == 0.1
    assert rates[-1] < 0.002


def test_the_input_model_and_the_random_states_are_untouched():
    model = net().train()
    model[0].eval()
    before, modes = state_digest(model), [m.training for m in model.modules()]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    fitted = fit(model, batches, step, epochs=1).module
    assert torch.equal(torch.rand(3), expected)
    assert state_digest(model) == before
    assert [m.training for m in model.modules()] == modes
    assert not any(m.training for m in fitted.modules())
    assert not same(fitted, model)
    assert all(p.grad is None for p in model.parameters())


def test_norm_and_dropout_are_in_train_mode():
    outputs = []

    def twice(model, batch):
        outputs.append((model(batch[0]).detach(), model(batch[0]).detach()))
        return step(model, batch)

    fitted = fit(net(dropout=0.5).eval(), batches, twice, epochs=1).module
    assert all(not torch.equal(a, b) for a, b in outputs)
    assert int(fitted[1].num_batches_tracked) == 3 * 4
    assert float((fitted[1].running_mean - net()[1].running_mean).abs().max()) > 1e-3


def test_frozen_parameters_stay_frozen():
    model = net()
    model[0].weight.requires_grad_(False)
    fitted = fit(model, batches, step, epochs=2, lr=0.1).module
    assert torch.equal(fitted[0].weight, model[0].weight)
    assert not fitted[0].weight.requires_grad
    assert not torch.equal(fitted[5].weight, model[5].weight)
    with pytest.raises(RejectedError, match="requires_grad"):
        fit(model.requires_grad_(False), batches, step, epochs=1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("epoch", "done"), [(0, 1), (1, 1), (1, 3), (2, 4)])
def test_a_stopped_training_resumes_to_the_same_bits(tmp_path, optimizer, epoch, done):
    path = tmp_path / "c.safetensors"
    options = {"epochs": 3, "optimizer": optimizer, "teacher": net(dropout=0), "distil": "kl"}
    quiet = Hook(name="stop")
    whole = fit(net(), batches, step, **options, hooks=[quiet])
    with pytest.raises(Interrupted, match=rf"holds {epoch} epochs"):
        fit(net(), batches, step, **options, checkpoint=path, hooks=[stop_at(epoch, done, KeyboardInterrupt())])
    torch.rand(7)  # the random state between the runs must not matter
    resumed = fit(net(), batches, step, **options, checkpoint=path, hooks=[quiet])
    assert same(resumed.module, whole.module)
    assert resumed.history == whole.history
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]

    def never(model, batch):
        raise AssertionError

    again = fit(net(), batches, never, **options, checkpoint=path, hooks=[quiet])  # all epochs are done
    assert same(again.module, whole.module)


def test_an_error_in_a_hook_passes_and_the_run_resumes(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(ZeroDivisionError):
        fit(net(), batches, step, epochs=2, checkpoint=path, hooks=[stop_at(1, 2, ZeroDivisionError())])
    resumed = fit(net(), batches, step, epochs=2, checkpoint=path, hooks=[Hook(name="stop")])
    assert same(resumed.module, fit(net(), batches, step, epochs=2).module)


def test_hook_state_survives_checkpoint_and_roll_back(tmp_path):
    path = tmp_path / "c.safetensors"

    def counting(*stop: Hook) -> tuple[Tensor, list[Hook]]:
        total = torch.zeros(1)
        hook = Hook(
            name="count", after_step=lambda t: total.add_(1), state=lambda: {"total": total}, restore=lambda s: total.copy_(s["total"])
        )  # fmt: skip
        return total, [hook, *(stop or (Hook(name="stop"),))]

    _, hooks = counting(stop_at(1, 2, KeyboardInterrupt()))
    with pytest.raises(Interrupted):
        fit(net(), batches, step, epochs=2, checkpoint=path, hooks=hooks)
    total, hooks = counting()
    fit(net(), batches, step, epochs=2, checkpoint=path, hooks=hooks)
    assert float(total) == 8


SCRIPT = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with it ignored
sys.path.insert(0, {folder!r})
import test_train_loop as t
from paredown.train import Hook, fit
from paredown.train.task import stream
import time
slow = Hook(name="slow", after_step=lambda _: time.sleep(0.2))  # not done before a loaded machine looks
fit(t.net(), t.batches, t.step, epochs=8, checkpoint=Path({path!r}), hooks=[slow])
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_resumes_to_the_same_bits(tmp_path, sign):
    path = tmp_path / "c.safetensors"
    script = SCRIPT.format(folder=str(Path(__file__).parent), path=str(path))
    process = forked.start(script)
    seen: set[int] = set()
    while len(seen) < 3 and process.poll() is None:  # three versions of the checkpoint: some epochs are done
        if path.exists():
            seen.add(path.stat().st_mtime_ns)  # inode numbers are used again
        time.sleep(0.01)
    process.send_signal(sign)
    begin = time.monotonic()
    process.wait(timeout=20)
    assert time.monotonic() - begin < 5
    if sign == signal.SIGINT:
        assert "Interrupted" in process.stderr
    else:
        assert process.returncode == -signal.SIGKILL
    slow = Hook(name="slow")
    done: list[int] = []
    resumed = fit(
        net(), batches, step, epochs=8, checkpoint=path, hooks=[slow], progress=lambda p: done.append(p.epoch)
    )
    assert done[0] >= 1
    assert same(resumed.module, fit(net(), batches, step, epochs=8, hooks=[slow]).module)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "c.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(training: Training) -> None:
        if training.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))  # a real "file too large" from the kernel

    try:
        with pytest.raises(ResourceError, match="bytes are needed"):
            fit(net(), batches, step, epochs=3, checkpoint=path, hooks=[Hook(name="fill", after_epoch=fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    resumed = fit(net(), batches, step, epochs=3, checkpoint=path, hooks=[Hook(name="fill")])
    assert same(resumed.module, fit(net(), batches, step, epochs=3, hooks=[Hook(name="fill")]).module)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    fit(net(), batches, step, epochs=1, checkpoint=path)
    with pytest.raises(UsageError, match=r"lr: 0\.01 then, 0\.02 now"):
        fit(net(), batches, step, epochs=1, lr=0.02, checkpoint=path)
    other = net()
    with torch.no_grad():
        other[0].weight[0] += 1
    with pytest.raises(UsageError, match="weights at the start"):
        fit(other, batches, step, epochs=1, checkpoint=path)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"\xff" * len(raw)])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    fit(net(), batches, step, epochs=1, checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RejectedError, match="Delete it"):
        fit(net(), batches, step, epochs=1, checkpoint=path)


def test_a_checkpoint_holds_no_pickle(tmp_path):
    path = tmp_path / "c.safetensors"
    fit(net(), batches, step, epochs=1, optimizer="adamw", checkpoint=path)
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert raw[8:9] == b"{"
    assert b"optimizer/0/exp_avg" in raw[: 8 + header]


def test_nan_rolls_back_halves_the_rate_and_is_recorded(tmp_path):
    rates = {}

    def poison(training: Training) -> None:
        rates.setdefault(training.epoch, []).append(training.optimizer.param_groups[0]["lr"])
        if training.epoch == 1 and training.scale == 1 and len(rates[1]) == 2:
            with torch.no_grad():
                next(training.module.parameters()).fill_(torch.nan)

    path = tmp_path / "c.safetensors"
    fitted = fit(
        net(), batches, step, epochs=3, schedule="constant", hooks=[Hook(name="p", after_step=poison)], checkpoint=path
    )
    assert [(e.epoch, bool(e.note)) for e in fitted.history] == [(1, False), (2, True), (2, False), (3, False)]
    assert "rolled back" in fitted.history[1].note
    assert rates[1] == [0.01, 0.01, 0.005, 0.005, 0.005, 0.005]
    assert rates[2] == [0.005] * 4
    assert all(bool(torch.isfinite(t).all()) for t in fitted.module.state_dict().values())
    again = fit(net(), batches, step, epochs=3, schedule="constant", hooks=[Hook(name="p")], checkpoint=path)
    assert again.history == fitted.history


def test_nan_that_stays_is_an_error():
    with pytest.raises(RejectedError, match="after 2 retries"):
        fit(net(), batches, lambda m, b: step(m, b) * torch.nan, epochs=1)


def test_a_finite_divergence_rolls_back():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    data = [(part, part.sum(1, keepdim=True)) for part in torch.split(x, 16)]
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    fitted = fit(
        model, lambda: data, lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), epochs=6, lr=0.8, momentum=0.0,
        schedule="constant",
    )  # fmt: skip
    assert [e.epoch for e in fitted.history if "× above the start" in e.note] == [3]
    assert fitted.history[-1].loss is not None
    assert fitted.history[-1].loss < 0.01


def test_a_last_batch_of_one_is_left_out_with_batch_norm():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x, y = torch.randn(9, 4), torch.randint(3, (9,))

    def data():
        return list(zip(torch.split(x, 4), torch.split(y, 4), strict=True))

    fitted = fit(model, data, step, epochs=1)
    assert (fitted.history[0].num_samples, fitted.history[0].num_skipped) == (8, 1)
    graph = capture(model, x[:4])
    fitted = fit(GraphModel(graph.eval_graph, graph.train_graph, graph.state), data, step, epochs=1)
    assert fitted.history[0].num_skipped == 1
    plain = fit(nn.Linear(4, 3), data, step, epochs=1)
    assert plain.history[0].num_samples == 9


def test_the_mean_loss_weighs_samples():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    data = [torch.full((3, 1), 1.0), torch.full((1, 1), 5.0)]
    fitted = fit(model, lambda: data, lambda m, b: m(b).mean(), epochs=1, lr=1e-12)
    assert fitted.history[0].loss == pytest.approx((3 * 1 + 5) / 4)


def test_graph_form_trains_as_the_module_does():
    model = net(dropout=0.0)
    program = capture(model, X[:4])
    graph = GraphModel(program.eval_graph, program.train_graph, program.state)
    a = fit(model, batches, step, epochs=2, lr=0.05).module.state_dict()
    b = fit(graph, batches, step, epochs=2, lr=0.05).module.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-5)
    assert float((a["0.weight"] - model[0].weight).abs().max()) > 1e-3


def test_batches_with_and_without_length_train_the_same():
    torch.manual_seed(0)
    fixed = list(batches())
    a = fit(net(), lambda: fixed, step, epochs=2)
    b = fit(net(), lambda: iter(fixed), step, epochs=2)
    assert same(a.module, b.module)


def test_endless_batches_need_max_steps():
    def endless():
        while True:
            yield X[:4], Y[:4]

    assert fit(net(), endless, step, epochs=2, max_steps=3).history[-1].num_samples == 12


def test_no_batches_are_refused_before_and_within_the_run():
    with pytest.raises(RejectedError, match="at least one batch"):
        fit(net(), list, step, epochs=1)
    spent = iter([(X[:4], Y[:4])])
    with pytest.raises(RejectedError, match="made anew"):
        fit(net(), lambda: spent, step, epochs=1)


@pytest.mark.parametrize("returned", [None, 1.0, torch.zeros(2, requires_grad=True), torch.zeros(())])
def test_step_must_return_a_loss(returned):
    with pytest.raises(UsageError, match="must return the loss"):
        fit(net(), batches, lambda m, b: returned, epochs=1)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"epochs": -1},
        {"distil": "kl"},
        {"temperature": 0},
        {"optimizer": "adam"},
        {"schedule": "step"},
    ],
)
def test_options_follow_one_rule_each(options):
    with pytest.raises(UsageError, match=r"must be .*Got"):
        fit(net(), batches, step, **{"epochs": 1, **options})


def test_an_optimizer_of_ones_own_keeps_its_rates():
    seen = []

    def own(parameters):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.01}])

    hook = Hook(name="h", after_step=lambda t: seen.append([g["lr"] for g in t.optimizer.param_groups]))
    fit(net(), batches, step, epochs=1, optimizer=own, hooks=[hook])
    assert seen[0] == [0.1, 0.01]
    assert seen[2] == pytest.approx([0.05, 0.005])


def test_clipping_bounds_the_step():
    moved = []
    for clip in (None, 1e-3):
        fitted = fit(
            net(), batches, step, epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=clip, schedule="constant"
        ).module
        moved.append(
            sum(
                float((a - b).detach().square().sum())
                for a, b in zip(fitted.parameters(), net().parameters(), strict=True)
            )
            ** 0.5
        )
    assert moved[1] <= 4e-3 * 1.01
    assert moved[0] > 0.1


def test_progress_counts_steps_and_epochs():
    seen: list[Progress] = []
    fit(net(), batches, step, epochs=2, progress=seen.append)
    assert [(p.epoch, p.step) for p in seen] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
        (1, 4),
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 4),
    ]
    assert len(seen[-1].history) == 2
    assert seen[0].steps == 4


def test_out_of_memory_is_a_resource_error_and_other_errors_pass():
    def greedy(model, batch):
        return step(model, batch) + torch.empty(10**15).sum()

    with pytest.raises(ResourceError, match="smaller batches"):
        fit(net(), batches, greedy, epochs=1)

    def wrong(model, batch):
        return step(model, (batch[0][:, :, :3], batch[1]))

    with pytest.raises(RuntimeError, match="mat1"):
        fit(net(), batches, wrong, epochs=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there():
    with pytest.raises(MissingError, match="cuda"):
        fit(net(), batches, step, epochs=1, device="cuda")
    with pytest.raises(MissingError, match="nonsense"):
        fit(net(), batches, step, epochs=1, device="nonsense")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_cuda_returns_to_the_cpu():
    fitted = fit(net(), batches, step, epochs=1, device="cuda", teacher=net(), distil="kl").module
    assert {p.device.type for p in fitted.parameters()} == {"cpu"}
    assert not same(fitted, net())
