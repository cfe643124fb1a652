"""Images, their features, and the sentences that refuse them."""

import numpy as np
import pytest

from jax_diffusion.evaluation import features


def refuses(call, *args, **options):
    """The one sentence in which a call is refused."""
    with pytest.raises(ValueError) as info:
        call(*args, **options)
    sentence = str(info.value)
    assert sentence.endswith((".", "?")) and "\n" not in sentence
    return sentence


def images_of(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def in_batches(images, size):
    return [{"image": images[i : i + size]} for i in range(0, len(images), size)]


def features_of(extractor, batches):
    """All features by kind, of batches that are extracted one after the other."""
    found = [*features.extract(extractor, batches)]
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def cloud(seed, n=50, d=6):
    """Features that are neither centred nor uncorrelated."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def line(*places):
    return np.array(places, float)[:, None]
