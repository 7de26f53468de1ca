"""From a problem and a GPU to the config worth running: candidates, what the compiler makes of them, a race, a record."""
