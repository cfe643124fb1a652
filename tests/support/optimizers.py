"""Functions from outside the package that a config may name as its optimizer."""

import optax


def needy(learning_rate, momentum):
    """Takes an argument that has no default."""
    return optax.sgd(learning_rate, momentum)


def none(learning_rate):
    """Returns something else."""
    return {}


def broken(learning_rate):
    """Raises an error of its own."""
    raise KeyError("x")
