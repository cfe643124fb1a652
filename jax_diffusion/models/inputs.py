"""Whether a network is given what it takes besides images and timesteps."""

from typing import Any

from jax_diffusion import checks


def check_conditioning(
    network: Any,
    x: Any,
    label: Any = None,
    cond: Any = None,
    tokens: Any = None,
    tokens_mask: Any = None,
) -> None:
    """Checks the inputs of a call against the fields of a network that say them.

    Args:
        network: its `num_classes`, `cond_dim` and `token_dim` say what it takes.
        x: the images.
        label, cond, tokens, tokens_mask: as given.

    Raises:
        ValueError: if one is missing, not wanted or of another shape; it begins with
            the name of the argument.
    """
    if (label is None) != (network.num_classes is None):
        rule = f"label must {'' if label is None else 'not '}be given to a network with"
        got = "None" if label is None else checks.shown(label)
        raise ValueError(f"{rule} num_classes = {network.num_classes}, got {got}.")
    for name, value, field in (
        ("cond", cond, "cond_dim"),
        ("tokens", tokens, "token_dim"),
    ):
        size = getattr(network, field, 0)
        if (value is not None) != bool(size):
            rule = f"{name} must {'' if size else 'not '}be given to a network with"
            got = "None" if value is None else checks.shown(value)
            raise ValueError(f"{rule} {field} = {size}, got {got}.")
        if value is not None:
            middle = ("n",) if name == "tokens" else ()
            checks.array(name, value, "float", (x.shape[0], *middle, size))
    if tokens_mask is not None:
        if tokens is None:
            raise ValueError(
                f"tokens_mask needs tokens, got {checks.shown(tokens_mask)} alone."
            )
        # The number of tokens is a symbol where a sampler is exported.
        sizes = [n if isinstance(n, int) else str(n) for n in tokens.shape[:2]]
        checks.array("tokens_mask", tokens_mask, "bool", sizes)
