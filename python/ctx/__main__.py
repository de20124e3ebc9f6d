"""`python -m ctx`: see `ctx.cli`."""

import sys

from ctx.cli.main import main

sys.exit(main())
