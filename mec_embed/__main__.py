"""``python -m mec_embed``: the command line."""

import sys

from .cli import main

sys.exit(main())
