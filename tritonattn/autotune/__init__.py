"""Tuning: candidates for a problem on a GPU, what the compiler makes of them, a timed search, and a record of the best."""
