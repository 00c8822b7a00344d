"""Training: the user's task, one loop with hooks, distillation, batch-norm re-estimation, checkpoints."""

from paredown.train.batch_norm import reestimate_batch_norm
from paredown.train.loop import Epoch, Fitted, Hook, Progress, Training, fit
from paredown.train.masks import keep_masks
from paredown.train.recover import recover
from paredown.train.roles import Roles, check_roles, content_hashes
from paredown.train.task import Metric, Task, metric_values, predictor, task_from_module

__all__ = [
    "Epoch",
    "Fitted",
    "Hook",
    "Metric",
    "Progress",
    "Roles",
    "Task",
    "Training",
    "check_roles",
    "content_hashes",
    "fit",
    "keep_masks",
    "metric_values",
    "predictor",
    "recover",
    "reestimate_batch_norm",
    "task_from_module",
]
