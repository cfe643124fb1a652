"""Networks of Flax NNX, Equinox, Haiku or plain JAX, as two functions."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from jax_diffusion import checks
from jax_diffusion.checks import signatures


@dataclasses.dataclass(frozen=True)
class FunctionNetwork:
    """A network that `from_functions` makes; it is called as one of Flax."""

    init_fn: Callable[..., PyTree]
    apply_fn: Callable[..., Array]
    num_classes: int | None = None
    num_labels: int | None = None
    low_res: bool = False
    cond_dim: int = 0
    token_dim: int = 0

    def init(self, key: Array, x: Array, timesteps: Array, *label: Array, **cond: Any):
        """Returns {"params": ...}, dicts with the names of the parameters as keys."""
        cond |= {"label": label[0]} if label else {}
        params = self.init_fn(key, x, timesteps, **cond)
        nnx: Any = sys.modules.get("flax.nnx")  # if it is not there, nobody uses it
        kinds = (nnx.Variable,) if nnx else ()
        for leaf in jax.tree.leaves(params, is_leaf=lambda a: isinstance(a, kinds)):
            if isinstance(leaf, kinds) and not isinstance(leaf, nnx.Param):
                rule = "init must return parameters, and no other variables"
                raise ValueError(f"{rule}, got {checks.shown(leaf)}.")
        named = _by_name(params)
        for name, leaf in named.items():
            checks.array(f"parameter {'/'.join(name)}", leaf, "float")
        return {"params": unflatten_dict(named)}

    def apply(
        self,
        variables: PyTree,
        x: Array,
        timesteps: Array,
        *label: Array,
        train: bool = False,
        rngs: Any = None,
        **cond: Any,
    ) -> Array:
        """Returns the network's output, given {"params": ...} and its inputs."""
        cond |= {"label": label[0]} if label else {}
        tree = jax.eval_shape(self.init_fn, jax.random.key(0), x, timesteps, **cond)
        found = flatten_dict(variables["params"])
        wanted = _by_name(tree)
        if differ := sorted("/".join(n) for n in wanted.keys() ^ found.keys()):
            rule = "params must be those that init returns"
            raise ValueError(f"{rule}, got others at {differ[0]}.")
        leaves = [found[name] for name in wanted]
        params = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        cond |= dict(train=train, rngs=rngs or {})
        signatures.takes("apply", self.apply_fn, "params", "x", "timesteps", **cond)
        return self.apply_fn(params, x, timesteps, **cond)


def from_functions(
    init: Callable[..., PyTree],
    apply: Callable[..., Array],
    *,
    num_classes: int | None = None,
    num_labels: int | None = None,
    low_res: bool = False,
    cond_dim: int = 0,
    token_dim: int = 0,
) -> FunctionNetwork:
    """Makes a network of any library from two pure functions.

    tests/research/test_train_nnx.py and test_train_equinox.py are whole examples.

    Parameters may be any pytree. Train state, checkpoints and exports hold them as
    dicts by name, {"block": {"kernel": ...}}; `apply` gets them back as they were.

    Args:
        init: init(key, x, timesteps, **cond) -> params, which are float arrays alone:
            statistics of batches and counts of keys cannot be trained. It is traced in
            every call, too, for the structure of params.
        apply: apply(params, x, timesteps, *, train, rngs, **cond) -> output. `train`
            says whether dropout is on, then rngs is {"dropout": key}, else {}. `cond`
            are `label` and `low_res`, if the network takes them, and all other
            conditioning by its name.
        num_classes, num_labels, low_res, cond_dim, token_dim: fields of a network, see
            `models`.

    Raises:
        ValueError: if init or apply cannot be called.

    >>> network = from_functions(
    ...     lambda key, x, timesteps: {"scale": jax.random.normal(key)},
    ...     lambda params, x, timesteps, *, train, rngs: params["scale"] * x,
    ... )
    """
    checks.function("init", init, "(key, x, timesteps, **cond)")
    checks.function("apply", apply, "(params, x, timesteps, *, train, rngs, **cond)")
    return FunctionNetwork(
        init,
        apply,
        num_classes=num_classes,
        num_labels=num_labels,
        low_res=low_res,
        cond_dim=cond_dim,
        token_dim=token_dim,
    )


def _by_name(tree: PyTree) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree by the words on the way to each, in the tree's order."""
    word = functools.partial(jax.tree_util.keystr, simple=True)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        tuple(word((key,)) for key in path) or ("value",): leaf for path, leaf in leaves
    }
