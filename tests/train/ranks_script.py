"""What every rank runs under torchrun, in test_train_ranks: `python ranks_script.py OUT`. Each writes OUT/RANK.json and OUT/RANK-NAME.safetensors."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from paredown.errors import Interrupted, ParedownError
from paredown.plan import Mask
from paredown.train import Hook, fit
from paredown.train.checkpoint import model_tensors
from paredown.train.masks import mask_hook

NUM, BATCH = 43, 12  # the last batch has 7: four for one rank, three for the other
X = torch.randn(NUM, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (NUM,), generator=torch.Generator().manual_seed(2))


def plain(seed=3):
    """No dropout, no batch norm: what two ranks do is what one process does."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))


class Observed(nn.Module):
    """Batch norm, dropout and an observer of the smallest input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head, self.dropout = nn.Linear(64, 3), nn.Dropout(0.5)
        self.register_buffer("smallest", torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("short", torch.zeros(2, 3, dtype=torch.int16).t())  # gloo knows no such numbers
        self.dropped = []

    def forward(self, x):
        with torch.no_grad():
            self.smallest.copy_(torch.minimum(self.smallest, x.min()))
            self.seen += len(x)
            self.short += len(x)
        x = self.dropout(self.norm(self.conv(x)).relu().flatten(1))
        self.dropped.append((x == 0).float().mean().item())
        return self.head(x)


def batches():
    """Shuffled and noisy, from the global generator, lazily: dropout must not change what is read next."""
    for index in torch.split(torch.randperm(NUM), BATCH):
        yield X[index] + 0.1 * torch.randn(len(index), 1, 6, 6), Y[index], index


def step(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def masks(seed=0):
    kept = np.random.default_rng(seed).random((16, 64)) < 0.3
    return {"3.weight": Mask.of(kept, "element")}


def masked(seed=0):
    net = plain()
    with torch.no_grad():
        for name, mask in masks(seed).items():
            net.get_parameter(name).mul_(torch.from_numpy(mask.kept))
    return net


OPTIONS = {
    "epochs": 3, "lr": 0.1, "clip_norm": 1.0, "seed": 7, "distil": "kl", "distil_weight": 0.5,
}  # fmt: skip


def train(net=None, hooks=None, **more):
    """The training whose result two ranks and one process share."""
    hooks = [mask_hook(masks())] if hooks is None else hooks
    return fit(net or masked(), batches, step, teacher=plain(9), hooks=hooks, **{**OPTIONS, **more})


def growing():
    """A mask that moves to where gradients are large, as those of RigL: ranks must choose alike."""
    state = {"kept": torch.from_numpy(masks()["3.weight"].kept.copy())}

    def grow(training):
        gradient = training.module.get_parameter("3.weight").grad
        state["kept"] = gradient.abs() >= gradient.abs().flatten().kthvalue(717).values

    def zero(training):
        with torch.no_grad():
            training.module.get_parameter("3.weight").mul_(state["kept"])

    return Hook(name="growing", after_backward=grow, after_step=zero, state=lambda: state, restore=state.update)


def failure(work):
    try:
        work()
    except ParedownError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def interrupted(rank, path):
    """Stopped in the second epoch, on every rank, then continued by the same call."""

    def stop(training):
        if training.epoch == 1 and training.step % training.steps == 2:
            raise KeyboardInterrupt

    try:
        train(hooks=[mask_hook(masks()), Hook(name="stop", after_step=stop)], checkpoint=path, distributed=True)
    except Interrupted:
        pass
    else:
        raise AssertionError
    return train(hooks=[mask_hook(masks()), Hook(name="stop")], checkpoint=path, distributed=True)


def main(out):
    torch.distributed.init_process_group("gloo")
    rank, told, models, ids = torch.distributed.get_rank(), {}, {}, []

    def seen(model, batch):
        ids.append(batch[2].tolist())
        return step(model, batch)

    def one_bad(model, batch):  # not finite on one rank, once in its second epoch
        ids.append(0)
        return step(model, batch) * (float("nan") if rank == 1 and len(ids) == 6 else 1.0)

    def strange(training):  # a mask of its own on either rank
        with torch.no_grad():
            training.module.get_parameter("3.weight")[rank] = 0

    progress = []
    fitted = train(distributed=True, progress=lambda p: progress.append(p.step))
    models["same"], told["history"] = fitted.module, [e.loss for e in fitted.history]
    told["progress"] = len(progress)
    models["grown"] = train(hooks=[growing()], distributed=True).module
    observed = fit(Observed(), batches, seen, epochs=2, lr=0.1, distributed=True).module
    models["observed"], told["ids"], told["dropped"] = observed, list(ids), observed.dropped
    ids.clear()
    rolled = fit(plain(), batches, one_bad, epochs=2, lr=0.1, distributed=True)
    models["rolled"], told["notes"] = rolled.module, [e.note for e in rolled.history]
    own = out / f"own-{rank}" / "training.safetensors"
    fit(plain(), batches, step, epochs=1, checkpoint=own, distributed=True)
    models["continued"] = interrupted(rank, out / "shared.safetensors").module
    told["other masks"] = failure(lambda: train(hooks=[Hook(name="strange", after_step=strange)], distributed=True))
    told["other weights"] = failure(lambda: train(net=plain(rank), distributed=True))
    extra = plain()
    extra.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    told["unused"] = failure(lambda: fit(extra, batches, step, epochs=1, distributed=True))
    told["too small"] = failure(lambda: fit(plain(), lambda: [(X[:1], Y[:1])], step, epochs=1, distributed=True))
    for name, model in models.items():
        save_file(
            {n: t.detach().contiguous().clone() for n, t in model_tensors(model).items()},
            out / f"{rank}-{name}.safetensors",
        )
    (out / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
