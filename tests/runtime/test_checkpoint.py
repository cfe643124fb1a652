"""Checkpoints: digests, damage that is found, and what can be read alone."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion.runtime import checkpoint, sharding
from jax_diffusion.training.reporting import from_plain

# Orbax leaves the other reads of a damaged checkpoint unfinished.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

STATE = {
    "step": np.int32(3),
    "params": {"kernel": np.random.default_rng(0).normal(size=(3, 3, 64, 32))},
    "ema_params": {"0.9": {"kernel": np.ones((3, 3, 64, 32))}},
}
STATE = jax.tree.map(lambda a: a.astype(np.float32) if a.ndim else a, STATE)
PLACES = jax.tree.map(
    lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), STATE
)


def save(workdir, *steps, keep=None, keep_every=None):
    with checkpoint.make_manager(workdir, keep=keep, keep_every=keep_every) as manager:
        for step in steps:
            state = STATE | {"step": np.int32(step)}
            checkpoint.save(manager, step, jax.device_put(state), {"at": step})


def restore(workdir, shardings=PLACES, **kept):
    with checkpoint.make_manager(workdir, **kept) as manager:
        return checkpoint.restore_or_init(
            manager, lambda: jax.device_put(STATE), shardings, **kept
        )


def steps_of(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def files_of(workdir, step, part="state"):
    found = (workdir / "checkpoints" / str(step) / part).rglob("*")
    return sorted(
        (p for p in found if p.is_file()), key=lambda p: p.stat().st_size, reverse=True
    )


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_any_flipped_bit_changes_the_digest():
    kernel = STATE["params"]["kernel"]
    seen = {checkpoint.digests({"a": kernel})["a"]}
    rng = np.random.default_rng(1)
    for _ in range(200):
        bits = kernel.view(np.uint32).reshape(-1).copy()
        bits[rng.integers(bits.size)] ^= np.uint32(1) << rng.integers(
            32, dtype=np.uint32
        )
        seen.add(checkpoint.digests({"a": bits.view(np.float32)})["a"])
    assert len(seen) == 201


def test_exchanged_numbers_change_the_digest():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    for b in (a[::-1], a[:, ::-1], a.T.reshape(2, 3)):
        assert checkpoint.digests({"a": a}) != checkpoint.digests({"a": b.copy()})


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_a_digest_does_not_depend_on_where_the_array_lies(fsdp, monkeypatch):
    state = STATE | {
        "half": np.ones((3, 4), jnp.bfloat16),
        "bytes": np.arange(9, dtype="u1"),
    }
    places = sharding.state_sharding(sharding.make_mesh(fsdp=fsdp), state)
    shared = jax.device_put(state, places)
    assert checkpoint.digests(shared) == checkpoint.digests(state)
    # Elsewhere than on one CPU host, the devices compute it.
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert checkpoint.digests(shared) == checkpoint.digests(state)


def test_restoring_what_eight_devices_saved_on_any_number(tmp_path):
    mesh = sharding.make_mesh(fsdp=8)
    places = sharding.state_sharding(mesh, STATE)
    with checkpoint.make_manager(tmp_path) as manager:
        checkpoint.save(manager, 3, jax.device_put(STATE, places), {})
    for count in (8, 2, 1):
        devices = jax.devices()[:count]
        mesh = sharding.make_mesh(fsdp=count, devices=devices)
        state, _ = restore(tmp_path, sharding.state_sharding(mesh, STATE))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state, STATE)))
        assert state["params"]["kernel"].sharding.device_set == set(devices)


def test_the_newest_and_every_so_many_stay(tmp_path):
    save(tmp_path, 2, 4, 6, 8, 10, keep=2, keep_every=4)
    assert steps_of(tmp_path) == [4, 8, 10]


def test_what_a_kill_has_left_too_many_is_removed_by_the_same_rule(tmp_path):
    save(tmp_path, 2, 4, 6, 8, 10)  # killed before any was removed
    restore(tmp_path, keep=2, keep_every=4)
    assert steps_of(tmp_path) == [4, 8, 10]


def test_the_rule_counts_whole_checkpoints(tmp_path):
    save(tmp_path, 2, 4, 6)
    damage_array(tmp_path, 6)
    with pytest.warns(UserWarning, match=r"step 6: .* Step 4 is whole"):
        restore(tmp_path, keep=1)
    assert steps_of(tmp_path) == [4]


DISK_FULL = [
    OSError(errno.ENOSPC, "No space left on device", "/x"),
    ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [source]"),
]


@pytest.mark.parametrize("error", DISK_FULL, ids=["Python", "TensorStore"])
@pytest.mark.parametrize("moment", ["save", "close"])
def test_a_full_disk_is_told_in_a_sentence_with_the_newest_whole_checkpoint(
    tmp_path, monkeypatch, error, moment
):
    save(tmp_path, 2)
    manager = checkpoint.make_manager(tmp_path)

    def fail(*args, **options):
        raise error

    with (
        pytest.raises(OSError, match=r"No space left on device; .* whole one is 2$"),
        checkpoint.closing(manager),
    ):
        if moment == "close":
            monkeypatch.setattr(manager, "wait_until_finished", fail)
        else:
            monkeypatch.setattr(manager, "save", fail)
            checkpoint.save(manager, 4, STATE, {})
    monkeypatch.undo()
    manager.close()
    assert steps_of(tmp_path) == [2] and restore(tmp_path)[1] == {"at": 2}


def test_an_error_that_is_no_disks_is_not_renamed(tmp_path, monkeypatch):
    manager = checkpoint.make_manager(tmp_path)
    monkeypatch.setattr(manager, "save", lambda *a, **b: 1 / 0)
    with pytest.raises(ZeroDivisionError), checkpoint.closing(manager):
        checkpoint.save(manager, 4, STATE, {})


def test_a_record_is_json_that_every_reader_takes(tmp_path):
    with checkpoint.make_manager(tmp_path) as manager:
        checkpoint.save(manager, 1, STATE, {"window": [{"loss": float("nan")}]})
    text = files_of(tmp_path, 1, "record")[0].read_text()
    assert "NaN" not in text
    assert np.isnan(from_plain(restore(tmp_path)[1]["window"])[0]["loss"])


def damage_array(workdir, step):
    flip(files_of(workdir, step)[0])


def damage_record(workdir, step):
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    path.write_text(path.read_text().replace(f'"at": {step}', '"at": 7'))


def truncate_array(workdir, step):
    path = files_of(workdir, step)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_array(workdir, step):
    files_of(workdir, step)[0].unlink()


def remove_record(workdir, step):
    (workdir / "checkpoints" / str(step) / "record" / "metadata").unlink()


DAMAGES = [damage_array, damage_record, truncate_array, remove_array, remove_record]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path, 2)
    with pytest.warns(UserWarning, match=r"damaged .* step 2: .* Step 1 is whole"):
        state, record = restore(tmp_path)
    assert int(state["step"]) == 1 and record == {"at": 1}
    # Moved, so that the run can save the same step again; nothing is deleted.
    assert steps_of(tmp_path) == [1] and (tmp_path / "bad_checkpoints" / "2").is_dir()
    save(tmp_path, 2)
    assert steps_of(tmp_path) == [1, 2]


def test_damage_of_parameters_is_found_when_they_alone_are_read(tmp_path):
    save(tmp_path, 1, 2)
    damage_array(tmp_path, 2)
    with pytest.warns(UserWarning, match=r"step 2: .* Step 1 is whole"):
        params = checkpoint.load_params(tmp_path, ema=None)
        average = checkpoint.load_params(tmp_path, ema="0.9")
    assert np.array_equal(params["kernel"], STATE["params"]["kernel"])
    assert np.array_equal(average["kernel"], STATE["ema_params"]["0.9"]["kernel"])
    assert steps_of(tmp_path) == [1, 2]  # reading moves nothing


@pytest.mark.parametrize("read", [restore, checkpoint.load_record])
def test_without_a_whole_checkpoint_nothing_starts_afresh(tmp_path, read):
    save(tmp_path, 1)
    damage_array(tmp_path, 1)
    remove_record(tmp_path, 1)
    with pytest.raises(ValueError, match=r"must hold a whole checkpoint.*step 1"):
        read(tmp_path)
    assert steps_of(tmp_path) == [1]


def test_one_average_is_read_alone(tmp_path):
    save(tmp_path, 1)
    params = checkpoint.load_params(tmp_path, ema="0.9")
    assert np.array_equal(params["kernel"], STATE["ema_params"]["0.9"]["kernel"])
    with pytest.raises(
        ValueError, match=r"ema must be one of \['0.9', 'none'\], got '0.99'"
    ):
        checkpoint.load_params(tmp_path, ema="0.99")


def test_a_workdir_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a checkpoint, and .* holds none"):
        checkpoint.load_record(tmp_path)
    state, record = restore(tmp_path)
    assert record is None and int(state["step"]) == 3  # initialised


def test_the_record_comes_back_as_json_has_it(tmp_path):
    save(tmp_path, 1)
    sealed = json.loads(
        (tmp_path / "checkpoints" / "1" / "record" / "metadata").read_text()
    )
    assert checkpoint.load_record(tmp_path) == sealed["record"] == {"at": 1}
    assert sealed["digests"].keys() == {
        *("step", "params/kernel", "ema_params/0.9/kernel")
    }
