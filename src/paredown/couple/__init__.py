"""Which channels must live or die together: found by running the exported graph on channel ids."""

from paredown.couple.assemble import couple
from paredown.couple.space import Coupling, Footprint, Pinned, Slice, Space, Unit

__all__ = ["Coupling", "Footprint", "Pinned", "Slice", "Space", "Unit", "couple"]
