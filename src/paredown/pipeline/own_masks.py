"""A level of the user's own masks: read from the file that the recipe names, checked before any long work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from paredown.couple import Coupling
from paredown.errors import UsageError
from paredown.examine import Cost
from paredown.granularity import Granularity
from paredown.pipeline.folder import file_digest
from paredown.plain import plain_copy
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune import masks_of
from paredown.prune.given import check_masks
from paredown.recipe import Recipe
from paredown.recipe_fields import Level, Prune
from paredown.score.patterns import protected_weights


def own_masks(asked: Prune, level: Level, program: Program, coupling: Coupling, cost: Cost) -> Plan:
    """The plan of a level with masks, on the model as it is there.

    Raises UsageError where the file changed since the recipe was read, a mask does not fit, or prunes what patterns spare.
    """
    path = _unchanged(level)
    plan = masks_of(program, path, granularity=asked.granularity_of(level))
    if asked.include or asked.exclude:
        spared = protected_weights(coupling, cost, plan.masks, asked.include, asked.exclude)
        if spared:
            msg = f"masks must leave alone what prune.include and prune.exclude spare. Got {', '.join(spared[:5])} in {path}. Take them out of one of the two."
            raise UsageError(msg)
    weights = sum(m.kept.size for m in plan.masks.values())
    density = sum(m.num_kept for m in plan.masks.values()) / weights
    made_by = {**plan.made_by, "masks": path.name, "sha256": level.masks_sha256, "density": density}
    return dataclasses.replace(plan, made_by=made_by)


def check_own_masks(recipe: Recipe, model: nn.Module) -> None:
    """The masks of levels that start from the dense model's shapes, before it is trained; raises UsageError."""
    given = [v for v in recipe.prune.levels if v.masks is not None]
    if not given:
        return
    plain, _ = plain_copy(model)  # the names that its parameters have without hooks of torch.nn.utils
    for level in recipe.prune.levels:
        cut = Granularity.parse(recipe.prune.granularity_of(level))
        if level.masks is not None:
            check_masks(plain, _unchanged(level), granularity=str(cut))
        if not cut.masked or cut.kind in ("row", "column") or level.factorize is not None:  # units may leave
            return


def _unchanged(level: Level) -> Path:
    assert level.masks is not None
    path = Path(level.masks)
    if path.is_file() and level.masks_sha256 is not None and file_digest(path) != level.masks_sha256:
        msg = f"masks must stay as they were when the recipe was read. Got another content of {path} now. Start the run anew."
        raise UsageError(msg)
    return path
