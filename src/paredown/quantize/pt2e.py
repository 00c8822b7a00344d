"""torchao's PT2E, called so that nothing is said and nothing is kept."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from paredown.program import quiet

_CACHES = (
    ("torchao.utils", "_assert_and_get_unique_device"),
    ("torch.ao.quantization.fx.utils", "assert_and_get_unique_device"),
)
"""Functions that remember the device of every graph they saw, and with it the graph. Private: a release may be without them."""


@contextlib.contextmanager
def pt2e() -> Iterator[None]:
    """Around calls of torchao: its log is kept quiet, and graphs that its caches would hold for ever are let go.

    >>> with pt2e():
    ...     pass
    """
    with quiet("torchao"):
        try:
            yield
        finally:
            for module, function in _CACHES:
                forget = getattr(getattr(sys.modules.get(module), function, None), "cache_clear", None)
                if forget is not None:
                    forget()
