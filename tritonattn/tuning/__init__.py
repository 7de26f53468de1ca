"""From a problem and a GPU to the configs worth running: candidates, what the compiler makes of them, a ranking, a table."""
