"""Benchmarks of tritonattn and its baselines. Run from the root of the repository."""
