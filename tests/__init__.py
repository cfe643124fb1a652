"""So that `tests.benchmarks` is found where a package has installed its own `tests`."""
