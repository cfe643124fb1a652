"""Peak rates of accelerators by their data sheets: what `roofline_share` divides by.

`train` logs the share of the peak FLOP/s that a run reaches where `PEAKS` knows the
device; a new one needs a row.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp


class Peak(NamedTuple):
    """The most that one device can do, by its vendor's data sheet.

    Attributes:
        bfloat16: FLOP/s of dense bfloat16 matrix products, without sparsity.
        float32: FLOP/s of float32 matrix products at JAX's default precision, which is
            one bfloat16 pass on TPUs and TF32 on GPUs.
        memory: bytes/s to and from its memory, reading and writing together.
        link: bytes/s that it sends to devices of its node, over all links together.
        node: number of devices that these links join.
        network: bytes/s that it sends to other nodes: its share of the network cards.
    """

    bfloat16: float
    float32: float
    memory: float
    link: float
    node: int
    network: float


# TPU: Google's "TPU v4", "v5e", "v5p" and "v6e" pages (cloud.google.com/tpu/docs): peak
# compute per chip, HBM bandwidth, half of the bidirectional ICI bandwidth per chip (v4:
# 2400 Gbit/s each way), chips in a pod, data center network per chip (v4: not told).
# GPU: NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU" and "H200
# Tensor Core GPU", SXM: half of the FLOP/s with sparsity, memory bandwidth, half of
# NVLink's 600 or 900 GB/s; DGX A100 and DGX H100: 8 GPUs with a network card each, of
# 200 and of 400 Gbit/s.
V5E = Peak(197e12, 197e12, 819e9, 200e9, 256, 3.125e9)
V5P = Peak(459e12, 459e12, 2765e9, 600e9, 8960, 6.25e9)
V6E = Peak(918e12, 918e12, 1638e9, 400e9, 256, 12.5e9)
PEAKS = {  # by jax.Device.device_kind
    "TPU v4": Peak(275e12, 275e12, 1200e9, 300e9, 4096, math.nan),
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 156e12, 1555e9, 300e9, 8, 25e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 156e12, 2039e9, 300e9, 8, 25e9),
    "NVIDIA H100 80GB HBM3": Peak(989.4e12, 494.7e12, 3350e9, 450e9, 8, 50e9),
    "NVIDIA H200": Peak(989.4e12, 494.7e12, 4800e9, 450e9, 8, 50e9),
}


def flop_rate(peak: Peak, dtype: Any) -> float:
    """Returns the peak FLOP/s of matrix products of this dtype.

    Raises:
        ValueError: for another dtype than float32 and bfloat16.
    """
    rates = {"bfloat16": peak.bfloat16, "float32": peak.float32}
    name = jnp.dtype(dtype).name
    if name not in rates:
        raise ValueError(f"dtype must be one of {sorted(rates)}, got {name!r}.")
    return rates[name]
