"""Search: tables measured with data, from which an allocation chooses."""

from __future__ import annotations

from paredown.search.sensitivity import Measuring, sensitivity

__all__ = ["Measuring", "sensitivity"]
