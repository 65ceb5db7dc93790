"""``python -m depthwire``: the command line."""

from __future__ import annotations

import sys

from depthwire.cli.main import main

sys.exit(main())
