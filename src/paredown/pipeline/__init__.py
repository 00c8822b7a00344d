"""compress: recipe -> files, records, report."""

from paredown.pipeline.compress import compress
from paredown.pipeline.stages import Compressed

__all__ = ["Compressed", "compress"]
