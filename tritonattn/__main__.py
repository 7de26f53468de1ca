"""The entry point of `python -m tritonattn`."""

import sys

from .cli.main import main

sys.exit(main())
