"""Benchmarks: ours beside every rival, each checked before it is timed. Run from the repository's root."""
