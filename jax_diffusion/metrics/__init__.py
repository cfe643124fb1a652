"""Metrics of sets of images, computed from their features or pixels.

| file | metric | from |
| --- | --- | --- |
| `fid` | FID, the Frechet distance; moments and their files | features [n, d] |
| `kid` | KID, the kernel distance | features [n, d] |
| `inception_score` | Inception score | logits [n, k] |
| `precision_recall` | improved precision and recall | features [n, d] |
| `channel_stats` | mean and standard deviation of channels | images uint8 [n h w c] |

No metric sees a network: features come in as arrays, which `jax_diffusion.evaluation`
computes, and flattened pixels are features too. All is computed in float64 on the host,
except for the distances between points in `precision_recall`, which are on the device.
"""

from jax_diffusion.metrics.channel_stats import (
    ChannelStats,
    channel_stats,
    color_metrics,
)
from jax_diffusion.metrics.features import Estimate
from jax_diffusion.metrics.fid import (
    Moments,
    frechet_distance,
    holds_moments,
    load_moments,
    merge,
    moments,
    save_moments,
    update,
)
from jax_diffusion.metrics.inception_score import inception_score
from jax_diffusion.metrics.kid import kernel_distance
from jax_diffusion.metrics.precision_recall import PrecisionRecall, precision_recall

colour_metrics = color_metrics  # the old name

__all__ = [
    "ChannelStats",
    "Estimate",
    "Moments",
    "PrecisionRecall",
    "channel_stats",
    "color_metrics",
    "colour_metrics",
    "features",
    "fid",
    "frechet_distance",
    "holds_moments",
    "inception_score",
    "kernel_distance",
    "kid",
    "load_moments",
    "merge",
    "moments",
    "precision_recall",
    "save_moments",
    "update",
]
