"""A compiled sampler with the network, steps and inputs that it draws with."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jax_diffusion import data
from jax_diffusion.runtime import sharding
from jax_diffusion.schedules import NoiseSchedule

DEFAULT_N = 64  # images


@dataclasses.dataclass(frozen=True, eq=False)
class BoundSampler:
    """A compiled sampler with the network, steps and labels that it draws with.

    Attributes:
        draw: the compiled function of `make_sampler`.
        params: its parameters: "model", perhaps "classifier" and "guide".
        schedule: its steps; padded ones share one compilation.
        rows: arrays of which image i has row i, in turn: "label", "image", "low_res",
            "cond", "tokens", "tokens_mask".
        numbers: eta, the noise of churn and the scales of guidance.
        rounding: how floats become uint8.
        choices: what defaults and files have come to, for records: "steps", "spacing",
            "ema", "mask"; digests of "conditioning" if `cond` is given; "noise" if it
            depends on rows since version 0.2 only.
        second: the sampler that enlarges what this one draws, if there is one.
        second_labels: its label for each label, int32 [k]; None if they agree.
        class_names: what the labels are called; None where they are numbers only.
    """

    draw: Callable[..., Any]
    params: Mapping[str, PyTree]
    schedule: NoiseSchedule
    rows: Mapping[str, np.ndarray]
    numbers: Mapping[str, float]
    rounding: str
    choices: Mapping[str, Any]
    second: "BoundSampler | None" = None
    second_labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def default_n(self) -> int:
        """How many images to draw unless that is said: one of each row of `cond`."""
        told = self.choices.get("conditioning")
        return min(len(self.rows[name]) for name in told) if told else DEFAULT_N

    def batches(
        self,
        n: int = 0,
        *,
        first: int = 0,
        ids: np.ndarray | None = None,
        seed: int = 0,
        batch_size: int = 256,
        mesh: Mesh | None = None,
        params: PyTree = None,
        on_compiled: Callable[[float], None] | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields batches of frames, uint8 [k, b, h, w, c], and their labels, int32 [b].

        On several hosts, all of them call it and get all images.

        Args:
            n: number of images.
            first: number of the first image.
            ids: numbers of the images instead, [n].
            seed: of all images.
            batch_size: number of images in all batches but perhaps the last one.
            mesh: the devices that share the work; by default all.
            params: parameters of the network, instead of those that are bound.
            on_compiled: is told the seconds that compilation took.
        """
        numbers = range(first, first + n) if ids is None else np.asarray(ids)
        mesh = mesh or sharding.make_mesh()
        bound = {**self.params} if params is None else {**self.params, "model": params}
        weights = sharding.replicate(mesh, bound)
        if self.second is not None:  # once, not each time
            second_weights = sharding.replicate(mesh, self.second.params)
        draw = self.draw
        for start in range(0, len(numbers), batch_size):
            some = np.asarray(numbers[start : start + batch_size])
            rows = {name: a[some % len(a)] for name, a in self.rows.items()}
            inputs = self._inputs(mesh, weights, some, rows, seed, batch_size)
            if on_compiled is not None:
                begun = time.perf_counter()
                draw = draw.lower(*inputs).compile()  # type: ignore[attr-defined]
                on_compiled(time.perf_counter() - begun)
                on_compiled = None
            frames = self._finish(draw(*inputs), len(some))
            if self.second is not None:
                label = rows["label"]
                if self.second_labels is not None:
                    label = self.second_labels[label]
                some_rows = {**rows, "low_res": frames[-1], "label": label}
                inputs = self.second._inputs(
                    mesh, second_weights, some, some_rows, seed, batch_size
                )
                frames = self.second._finish(self.second.draw(*inputs), len(some))
            yield frames, rows["label"]

    def _inputs(self, mesh, params, ids, rows, seed, batch_size):
        """The arguments of `draw`; all batches are filled up to one size."""
        filled = np.minimum(np.arange(batch_size), len(ids) - 1)
        rows = {"ids": ids.astype(np.int32), **rows}
        rows = {
            name: (data.from_uint8(a) if a.dtype == np.uint8 else a)[filled]
            for name, a in rows.items()
        }
        rows = sharding.shard_padded(mesh, rows)
        scalars = {k: np.float32(v) for k, v in self.numbers.items()}
        return params, self.schedule, np.uint32(seed % 2**32), rows, scalars

    def _finish(self, frames, n):
        return data.to_uint8(sharding.fetch(frames), self.rounding)[:, :n]
