"""python -m paredown: the same as the command `paredown`."""

import sys

from paredown.cli import main

sys.exit(main())
