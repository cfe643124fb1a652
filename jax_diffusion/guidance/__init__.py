"""Guidance: wrappers that steer a denoiser by a label, a classifier, a measurement.

    denoise_fn = classifier_free(denoise_fn, label, null_label, scale=3.0)
    denoise_fn = autoguidance(denoise_fn, weak_fn, scale=2.0)
    denoise_fn = classifier(denoise_fn, schedule, log_prob_fn, scale=1.0)
    denoise_fn = posterior(denoise_fn, log_likelihood_fn)

Each takes a denoiser and returns one, so that they nest, also with
`diffusion.clip_x_0`. The order matters:

    clip_x_0(classifier_free(f, ...))  clips the guided x_0
    classifier_free(clip_x_0(f), ...)  clips x_0 with the label and x_0 without it; the
                                       guided x_0 may lie outside the bounds
    classifier(classifier_free(...))   is the right order of the two: inside
                                       `classifier_free` every image has two rows, and a
                                       log_prob_fn with one label an image has too few;
                                       the same goes for `posterior` with one
                                       measurement an image, and for `classifier_free`
                                       itself: give two conditions by name to one

    labels     classifier_free; drop_labels and drop for training with hidden ones
    pairs      of two denoisers: autoguidance, adaptive_projected, zero_star; the table
               GUIDANCE_METHODS
    gradients  classifier, posterior, shift_x_0; label_log_prob
    scales     within: guidance at some noise levels only
"""

from jax_diffusion.guidance.gradients import (
    classifier,
    label_log_prob,
    posterior,
    shift_x_0,
)
from jax_diffusion.guidance.labels import classifier_free, drop, drop_labels
from jax_diffusion.guidance.pairs import (
    GUIDANCE_METHODS,
    adaptive_projected,
    autoguidance,
    zero_star,
)
from jax_diffusion.guidance.scales import Scale, within

__all__ = [
    "GUIDANCE_METHODS",
    "Scale",
    "adaptive_projected",
    "autoguidance",
    "classifier",
    "classifier_free",
    "drop",
    "drop_labels",
    "label_log_prob",
    "posterior",
    "shift_x_0",
    "within",
    "zero_star",
]
