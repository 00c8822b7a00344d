"""Every way to prune in training, interrupted and resumed, gives the bits of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_task import BATCHES, WAYS, assert_resumes


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_and_resumed_is_the_same(way: str, tmp_path: Path) -> None:
    options = WAYS[way]
    at = BATCHES + 3
    if way in ("lottery", "learning-rate rewinding", "levels"):
        at = 4 * BATCHES + 3  # within the second training
    assert_resumes(tmp_path, at, **options)
