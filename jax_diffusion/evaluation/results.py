"""Results of an evaluation: scores, the table that shows them, and scores.json."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jax_diffusion.runtime import files

# Names that metrics had before version 0.2, in --metrics and config.evaluation.metric,
OLD_METRICS = {
    "ode": "nll_ode",
    "classifier_distance": "cnn_fd",
    "classifier_score": "cnn_is",
    "classifier_kernel": "cnn_kid",
    "classifier_precision_recall": "cnn_precision_recall",
}
# and those of the scores that such metrics consist of, in scores.json.
OLD_SCORES = OLD_METRICS | {
    "ode_bits_per_dim": "nll_ode",
    "ode_step_error": "nll_ode_step_error",
    "ode_probe_error": "nll_ode_probe_error",
    "classifier_precision": "cnn_precision",
    "classifier_recall": "cnn_recall",
}
OLD_REAL, REAL = "_of_data", "_real_vs_real"


class Score(NamedTuple):
    """One number of the table.

    Attributes:
        metric: name of the score, such as "fid_n2000" or "bits_per_dim".
        value: the number itself.
        images: how many images it was computed from.
        error: its uncertainty, or None where it has none. Standard error of the mean
            for likelihoods, standard deviation over subsets for KID and over splits
            for the Inception score.
    """

    metric: str
    value: float
    images: int
    error: float | None = None


class Scores(list[Score]):
    """The scores of one evaluation, in a list that prints as a table.

    Attributes:
        record: everything that is known about how the scores were made, as it is
            written to scores.json: scores, errors and numbers of images by metric,
            seed, network, samples, reference, versions, hardware, command, seconds; as
            "failures", why a metric that was asked for could not be computed.

    >>> Scores([Score("fid", 3.17, 50_000), Score("bits_per_dim", 3.7, 64, 0.05)])
    metric        value      +-  images
    fid            3.17           50000
    bits_per_dim    3.7  0.0500      64
    """

    def __init__(
        self, scores: Iterable[Score] = (), record: dict[str, Any] | None = None
    ):
        super().__init__(scores)
        self.record = {} if record is None else record

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Scores":
        """Returns the scores that a record has, as `read_records` returns it."""
        images, errors = record["images"], record["errors"]
        scores = [
            Score(k, math.nan if v is None else v, images[k], errors.get(k))
            for k, v in record["scores"].items()
        ]
        return cls(scores, record)

    @property
    def failures(self) -> dict[str, str]:
        """Why metrics that were asked for could not be computed, by name."""
        return self.record.get("failures", {})

    def __repr__(self) -> str:
        rows = [("metric", "value", "+-", "images")]
        for score in self:
            error = "" if score.error is None else f"{score.error:.4f}"
            rows.append((score.metric, f"{score.value:.6g}", error, str(score.images)))
        lines = aligned(rows)
        lines += [f"{name}: {reason}" for name, reason in self.failures.items()]
        seconds = self.record.get("seconds")
        if seconds:
            spent = ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items())
            lines.append(f"seconds: {spent}")
        return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table, its first column left-aligned, others right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)])
        for row in rows
    ]


def side_by_side(title: str, found: Mapping[str, Scores]) -> str:
    """Returns a table of several evaluations, a row for each and a column for a score.

    Numbers of images and seconds are left out, see the records.

    Args:
        title: what the rows are called by.
        found: the scores by the name of their row.

    >>> one, two = [Score("fid", 3.17, 2000)], [Score("fid", 3.2, 2000)]
    >>> print(side_by_side("ema_width", {"0.05": Scores(one), "0.1": Scores(two)}))
    ema_width   fid
    0.05       3.17
    0.1         3.2
    """
    names = list(dict.fromkeys(s.metric for scores in found.values() for s in scores))
    rows = [(title, *names)]
    for name, scores in found.items():
        values = {
            s.metric: f"{s.value:.6g}" + (f" +- {s.error:.4f}" if s.error else "")
            for s in scores
        }
        rows.append((name, *(values.get(metric, "-") for metric in names)))
    return "\n".join(aligned(rows))


class Result(NamedTuple):
    """What one part of an evaluation returns; `evaluate` joins them.

    Attributes:
        scores: its scores; none on hosts other than the first one.
        about: how they were made, entries for the record.
        seconds: time that each stage took.
        finish: functions to call once scores.json has been written, which turn parts
            of files into whole files, or remove them.
        failures: why a metric could not be computed, by name.
    """

    scores: list[Score]
    about: dict[str, Any]
    seconds: dict[str, float]
    finish: Sequence[Callable[[], None]] = ()
    failures: Mapping[str, str] = MappingProxyType({})


class Clock:
    """Measures the seconds of each stage of an evaluation.

    Attributes:
        seconds: by name of the stage, rounded to tenths.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def end(self, stage: str) -> None:
        """Charges the time since the last call to a stage that ends now."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._mark, 1)
        self._mark = now


def current_name(name: str) -> str:
    """Returns today's name of a metric or score, which may be given by an old name.

    >>> current_name("classifier_distance_of_data")
    'cnn_fd_real_vs_real'
    """
    base = name.removesuffix(OLD_REAL)
    return OLD_SCORES.get(base, base) + (REAL if name != base else "")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the evaluations in a scores.json, oldest first, with today's names.

    Returns:
        Their records, see `Scores`; none if there is no such file.

    Raises:
        ValueError: if the file is not what `append_record` writes.
    """
    records = []
    for entry in _read(path):
        record = {"nll_ode" if k == "ode" else k: v for k, v in entry.items()}
        for field in ("scores", "errors", "images"):
            values = record.get(field, {})
            record[field] = {current_name(name): v for name, v in values.items()}
        records.append(record)
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds an evaluation to a scores.json, which is whole before and after.

    Raises:
        ValueError: if a file is there that is not what this function writes.
    """
    text = files.json_text({"evaluations": [*_read(path), record]}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, text)


def _read(path: Path) -> list[Any]:
    if not path.exists():
        return []
    try:
        # Until version 0.2 there was NaN in it, which is not JSON.
        content = json.loads(path.read_text(), parse_constant=lambda word: None)
        return [*content["evaluations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be an object with a list `evaluations`, got {error!r}."
        ) from error
