"""Lets Python find `tests.benchmarks` where a package has installed its own `tests`."""
