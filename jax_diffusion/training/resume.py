"""The rule by which a run is continued: the same config and data, or named changes.

A workdir's run goes on with the config that its newest checkpoint records. Free fields
(`config.FIELDS`) may differ. Any other may if it is named, as with
`--allow-change optimizer.lr,data.path`, and if the saved state fits what it describes:
then the new config is recorded, and run.json tells the step of the change. A data set
is known by its digest (`data.Examples.digest`), not by its path, so that a folder may
be moved.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jax_diffusion import checks, data
from jax_diffusion import config as configs
from jax_diffusion.registry import hint
from jax_diffusion.runtime import checkpoint, sharding, workdirs
from jax_diffusion.runtime.files import leaves_by_name
from jax_diffusion.training.setup import TrainingSetup

# Fields of config.data that leave the images and labels as they are.
SAME_IMAGES = ("batch_size", "flip", "in_memory", "on_error")


class SavedRun(NamedTuple):
    """The run that a workdir holds, as it is to be continued.

    Attributes:
        record: of its newest checkpoint, in the present format.
        changes: what the config of this start changes, as "optimizer.lr: 0.1 -> 0.01";
            free fields are not listed.
        allowed: names of the fields that may change.
        refused: those of the changes that may not be made.
    """

    record: dict[str, Any]
    changes: list[str]
    allowed: tuple[str, ...]
    refused: list[str]

    @property
    def origin(self) -> str:
        """config.init_from of the run's first start."""
        return _origin(self.record["config"])

    def check(self, workdir: Path, setup: TrainingSetup) -> None:
        """Checks that the run can go on with the data and the state of this start.

        Host 0 prints it if nothing is known of the images of before.

        Args:
            workdir: the folder of the run.
            setup: of the config of this start; its state is not computed.

        Raises:
            ValueError: if a field differs that may not, or the images do and no change
                of config.data that is allowed makes them so; or if the arrays of the
                saved state are not those of a config that was changed.
        """
        now, before = setup.batches.image_shape, tuple(self.record["image_shape"])
        others = (
            ""
            if now == before
            else (f"the data now have images {now}, the run was trained on {before}")
        )
        refused = [*self.refused, *self.refused_data(setup.batches, others)]
        if refused or self.changes or others:
            with configs.named("config.model", vars(setup.model)):
                state = jax.eval_shape(setup.init)
            misfit = misfit_of(workdir, state)
            if refused:
                raise _refusal(workdir, refused, misfit, others)
            if misfit:
                changes = "; ".join([*(self.changes or self.allowed), others])
                raise ValueError(
                    "allow_change must name fields that leave the arrays of the saved "
                    f"state as they are, got {changes.removesuffix('; ')}, with which "
                    f"{misfit}."
                )
        if "data_digest" not in self.record and jax.process_index() == 0:
            print(
                "the run was begun by a version that did not record a digest of its "
                "images, so that others would not be noticed; now "
                f"{setup.batches.num_examples} images are read",
                flush=True,
            )

    def refused_data(self, batches: data.Batches, others: str) -> list[str]:
        """What is refused because the images are others, as a line of changes.

        Args:
            batches: the images of this start.
            others: how their shape differs; "" if it does not.
        """
        before, digest = self.record.get("data_digest"), batches.examples.digest
        conditioning = data.record_of(batches.stored_conditioning)
        other_conditioning = self.record.get("conditioning", {}) != conditioning
        if (
            before == digest
            and digest is not None
            and not others
            and not other_conditioning
        ):
            return []
        names = [_name(line) for line in self.changes if line.startswith("data.")]
        names = [n for n in names if n.removeprefix("data.") not in SAME_IMAGES]
        told = {_name(line) for line in self.refused}
        if told & {*names} or any(
            _covers(self.allowed, name) for name in ["data.path", *names]
        ):
            return []
        what = "images" if others or before != digest else "conditioning"
        moved = [line for line in self.changes if _name(line) == "data.path"]
        if moved:
            return [f"{moved[0]}, which holds other {what}"]
        if other_conditioning or others or (before is not None and digest is not None):
            return [f"data.path: other {what} than the run was trained with"]
        return []


def misfit_of(workdir: Path, state: PyTree) -> str:
    """Says which arrays of the saved state are not those of this one; "" if none."""
    before = checkpoint.load_shapes(workdir)
    after = {name: tuple(a.shape) for name, a in leaves_by_name(state).items()}
    names = sorted(before.keys() | after.keys())
    other = [n for n in names if before.get(n) != after.get(n)]
    if not other:
        return ""
    return (
        f"{len(other)} of {len(names)} differ, such as {other[0]}: "
        f"{before.get(other[0], '(none)')} -> {after.get(other[0], '(none)')}"
    )


def find_run(
    config: Mapping[str, Any], workdir: Path, allow_change: Sequence[str] = ()
) -> SavedRun | None:
    """Finds the run that a workdir holds, and what a config changes of it.

    Whether it can be continued is for `SavedRun.check` to judge, once it is known that
    the config is right by itself.

    Args:
        config: the config of this start, in plain JSON values.
        workdir: the folder of the run.
        allow_change: names of fields, or of whole groups, that may differ.

    Returns:
        The run; None if the workdir holds no checkpoint.

    Raises:
        ValueError: if an allowed name is that of no field, if the run was begun with
            other weights, if a run cannot begin in the workdir (see `workdirs`), or if
            the processes of this job have different configs.
    """
    several = isinstance(allow_change, Iterable) and not isinstance(allow_change, str)
    names: list[Any] = [*allow_change] if several else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            "allow_change must be a list of names of fields, got "
            f"{checks.shown(allow_change)}."
        )
    allowed = tuple(name.removeprefix("config.") for name in names)
    if not sharding.same_on_all_hosts(json.dumps([config, allowed], sort_keys=True)):
        raise ValueError("all processes must be given one config, got several.")
    fresh, record = checkpoint.latest_step(workdir) is None, {}
    if not fresh:
        record = configs.upgrade(checkpoint.load_record(workdir))
    saved = record.get("config", {})
    check_names(allowed, saved, config)
    if fresh:
        workdirs.check_new(workdir, config["data"].get("path"))
        return None
    changes = configs.differences(saved, {**config, "init_from": _origin(saved)})
    if config.get("init_from", "") not in ("", _origin(saved)):
        like = f" or {_origin(saved)!r}, as then" if _origin(saved) else ""
        raise ValueError(
            f"init_from must be left out{like}, since {str(workdir)!r} holds a run, "
            f"got {config['init_from']!r}."
        )
    known_data = record.get("data_digest") is not None
    refused = [
        line
        for line in changes
        if not _covers(allowed, _name(line))
        and not (known_data and _name(line) == "data.path")
    ]
    return SavedRun(record, changes, allowed, refused)


def undecoded(config: configs.Config) -> configs.Config:
    """Returns the config with files of images left undecoded, where they can be.

    It is for checking a config that is going to be refused, which must not take long.
    """
    config = config.copy_and_resolve_references()
    if config.data.name in ("folder", "tfds"):
        config.data.in_memory = False
    return config


def history(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a record says of the run's past: "init_from" and "changes"."""
    return {name: record[name] for name in ("init_from", "changes") if name in record}


def record_changes(record: dict[str, Any], step: int, changes: Sequence[str]) -> None:
    """Adds the changes of this start to a record, and host 0 prints them.

    Args:
        record: with "changes", a list of {"step", "fields"}, if there were some before.
        step: number of updates made.
        changes: as of `SavedRun`.
    """
    if not changes:
        return
    before = record.get("changes", [])
    record["changes"] = [*before, {"step": step, "fields": [*changes]}]
    if jax.process_index() == 0:
        print(f"from step {step} on: {'; '.join(changes)}", flush=True)


def _origin(saved: Mapping[str, Any]) -> str:
    return saved.get("init_from", "")


def _name(line: str) -> str:
    """The field of a line of `config.differences`."""
    return line.partition(":")[0]


def _covers(allowed: Sequence[str], name: str) -> bool:
    """Whether a field, or the group that it is in, may change."""
    return name in allowed or name.partition(".")[0] in allowed


def check_names(allowed: Sequence[str], *of: Mapping[str, Any]) -> None:
    """Raises ValueError for a name that is no field of these configs."""
    known = {*configs.FIELDS}
    for config in of:
        for group, value in config.items():
            inside = value if isinstance(value, Mapping) else ()
            known |= {f"{group}.{name}" for name in inside}
    for name in allowed:
        if name not in known:
            raise ValueError(
                f"allow_change must name fields of the config, got {name!r}"
                f"{hint(name, known)}"
            )
        if name == "init_from":
            raise ValueError(
                "allow_change must not name init_from, which is only read when a run "
                "begins."
            )


def _refusal(workdir: Path, lines: list[str], misfit: str, others: str) -> ValueError:
    names = ",".join(_name(line) for line in lines)
    if any(line.startswith("model.num_classes") for line in lines):
        lines = [*lines, "num_classes does not count the class of hidden labels"]
    lines = [*lines, *filter(None, [others])]
    then = f"which goes on with this one if it is told --allow-change {names}"
    if misfit:
        then = f"whose saved state is not that of this one, as of its arrays {misfit}"
    return ValueError(
        f"workdir {str(workdir)!r} holds a run with another config, {then}; what "
        f"differs: {'; '.join(lines)}."
    )
