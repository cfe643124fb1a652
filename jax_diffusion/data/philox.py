"""Random numbers that no release of NumPy may change: raw output of Philox.

NumPy guarantees the stream of a bit generator, but not that of the methods of
`Generator` such as `permutation`. Order, flips and synthetic images use the former.
"""

import numpy as np

ORDER, FLIP, DISCS = range(3)  # one stream for each purpose


def draw(stream: int, seed: int, index: int, count: int) -> np.ndarray:
    """Draws random numbers that depend on (stream, seed, index) alone.

    Args:
        stream: `ORDER`, `FLIP` or `DISCS`; streams start 2^192 blocks apart, so they
            never meet.
        seed: integer in [0, 2^64).
        index: integer in [0, 2^64), such as an epoch or a step.
        count: how many numbers.

    Returns:
        uint64 [count], uniform over all 2^64 values.
    """
    key, counter = (np.array(v, np.uint64) for v in ([seed, index], [0, 0, 0, stream]))
    return np.random.Philox(key=key, counter=counter).random_raw(count)
