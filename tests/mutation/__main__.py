"""Entry of `python -m tests.mutation`."""

from .run import main

main()
