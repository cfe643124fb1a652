"""The cost of compiled programs, and what the train step's devices exchange.

Text: hand-written instructions of every form, whose numbers are counted here by hand.
Programs: products and sums of known size. The train step: bounds that follow from what
data parallelism and fully sharded parameters are, at four bytes a parameter.
"""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from benchmarks import roofline
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_diffusion import diffusion, schedules, timesteps, training
from jax_diffusion.models.unet import UNet
from jax_diffusion.runtime import device_peaks, sharding

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n"
PEAK = device_peaks.Peak(
    bfloat16=200.0, float32=100.0, memory=10.0, link=4.0, node=4, network=1.0
)


def only(line):
    """The one exchange of a program of this one instruction."""
    (found,) = roofline.collectives(f"{HEADER}ENTRY %main () -> f32[] {{\n  {line}\n}}")
    return found


# Every line, the bytes of its array and the devices of its group.
FORMS = {
    "all-reduce of an array": (
        "%ar = f32[16,4]{1,0} all-reduce(%x), channel_id=1, "
        "replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%a",
        ("all-reduce", 16 * 4 * 4, (0, 1, 2, 3)),
    ),
    "combined, of a tuple with comments, layouts of a TPU and operands with shapes": (
        "ROOT %ar.1 = (f32[8]{0:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, "
        "/*index=2*/pred[]{:T(256)}) all-reduce(f32[8]{0} %x, bf16[2,3] %y, "
        "pred[] %z), replica_groups=[2,4]<=[8], to_apply=%add",
        ("all-reduce", 8 * 4 + 6 * 2 + 1, (0, 1, 2, 3)),
    ),
    "groups of a table whose axes are turned": (
        "%ar = f32[] all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add",
        ("all-reduce", 4, (0, 4)),
    ),
    "groups along an axis of a mesh": (
        "%ar = f32[5] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}, to=%s",
        ("all-reduce", 20, (0, 4)),
    ),
    "groups along both axes": (
        "%ar = f32[5] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}",
        ("all-reduce", 20, tuple(range(8))),
    ),
    "groups along an axis of a mesh of devices in another order": (
        "%ag = f32[8] all-gather(%x), channel_id=3, replica_groups=mesh['a'=4,'b'=1,"
        "'c'=2], device_ids=([2,4]T(1,0)) {'c'}, dimensions={0}",
        ("all-gather", 32, (0, 4)),
    ),
    "groups along a factor of an axis": (
        "%ag = f32[8] all-gather(%x), replica_groups=mesh['a'=8] {'a':(2)2}",
        ("all-gather", 32, (0, 2)),
    ),
    "no groups: all devices": (
        "%ag = f32[8,2]{1,0} all-gather(%x), replica_groups={}, dimensions={0}",
        ("all-gather", 64, tuple(range(8))),
    ),
    "asynchronous all-reduce": (
        "%s = (f32[4]{0}, f32[6]{0}) all-reduce-start(%x, %y), replica_groups={{0,1}}",
        ("all-reduce", 40, (0, 1)),
    ),
    "asynchronous all-gather": (
        "%s = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%x), "
        "replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}",
        ("all-gather", 8 * 3 * 4, (0, 2, 4, 6)),
    ),
    "asynchronous and combined all-gather": (
        "%s = ((f32[2]{0}, s8[1]{0}), (f32[8]{0}, s8[4]{0})) all-gather-start(%x, %y), "
        "replica_groups=[2,4]<=[8], dimensions={0}",
        ("all-gather", 8 * 4 + 4, (0, 1, 2, 3)),
    ),
    "reduce-scatter, whose result is a part": (
        "%rs = f32[2,5]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8], "
        "dimensions={0}, to_apply=%add",
        ("reduce-scatter", 8 * 2 * 5 * 4, tuple(range(8))),
    ),
    "asynchronous reduce-scatter": (
        "%s = ((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%x), "
        "replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add",
        ("reduce-scatter", 64, (0, 1, 2, 3)),
    ),
    "all-to-all of a tuple": (
        "%a = (f32[1,7]{1,0}, f32[1,7]{1,0}) all-to-all(%x, %y), "
        "replica_groups={{0,1},{2,3},{4,5},{6,7}}",
        ("all-to-all", 56, (0, 1)),
    ),
    "collective-permute": (
        "%p = c64[3]{0} collective-permute(%x), "
        "source_target_pairs={{0,1},{1,2},{2,0}}",
        ("collective-permute", 24, (0, 1, 2)),
    ),
    "asynchronous collective-permute": (
        "%p = (u4[4]{0}, u4[4]{0}, u32[], u32[]) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,0}}",
        ("collective-permute", 2, (0, 1)),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_exchange_is_read(form):
    line, (kind, size, group) = FORMS[form]
    assert only(line) == roofline.Collective(kind, size, group)


@pytest.mark.parametrize(
    "line",
    [
        "%d = f32[4]{0} all-reduce-done(%all-reduce-start.1)",
        "%g = f32[4]{0} get-tuple-element(%all-gather), index=0",
        "%f = f32[4]{0} fusion(%all-reduce.2), kind=kLoop, calls=%all-reduce_fusion",
        '%c = f32[4]{0} copy(%x), metadata={op_name="an all-reduce(x)"}',
    ],
)
def test_what_only_names_an_exchange_is_none(line):
    assert (
        roofline.collectives(f"{HEADER}ENTRY %main () -> f32[] {{\n  {line}\n}}") == []
    )


def test_a_loop_exchanges_as_often_as_it_runs_and_a_channel_once():
    text = f"""{HEADER}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %ar = f32[4]{{0}} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
}}

%start (p: f32[4]) -> f32[32] {{
  %ag.1 = f32[32]{{0}} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
}}

%end (p: f32[4]) -> f32[32] {{
  %ag.2 = f32[32]{{0}} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
}}

ENTRY %main (p: f32[4]) -> f32[4] {{
  %w = (s32[], f32[4]) while(%t), condition=%c, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
  %f = f32[32] fusion(%p), kind=kCustom, calls=%start
  %g = f32[32] fusion(%f), kind=kCustom, calls=%end
}}
"""
    reduced, gathered = roofline.collectives(text)
    assert (reduced.kind, reduced.times, reduced.sent) == ("all-reduce", 5, 5 * 28)
    assert (gathered.kind, gathered.times, gathered.sent) == ("all-gather", 1, 7 * 16)
    assert roofline.traffic([reduced, gathered, gathered]) == {
        "all-reduce": (5, 80, 140.0),
        "all-gather": (2, 256, 224.0),
    }


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 3 / 4),
        ("all-gather", 3 / 4),
        ("reduce-scatter", 3 / 4),
        ("all-to-all", 3 / 4),
        ("collective-permute", 1.0),
    ],
)
def test_a_ring_of_four_sends(kind, sent):
    assert roofline.Collective(kind, 80, (0, 1, 2, 3)).sent == 80 * sent


def test_all_reduce_sends_as_much_as_reduce_scatter_and_all_gather():
    for n in (1, 2, 3, 8):
        sent = {
            k: roofline.Collective(k, 120, tuple(range(n))).sent for k in roofline.KINDS
        }
        assert sent["all-reduce"] == sent["reduce-scatter"] + sent["all-gather"]


# --- times


def test_seconds_are_those_of_the_slowest_and_of_what_is_not_hidden():
    exchange = roofline.Collective("all-to-all", 32, (0, 1, 2, 3))  # 24 bytes, 6 s
    for flops, moved, work in ((1000.0, 20.0, 10.0), (100.0, 50.0, 5.0)):
        cost = roofline.Cost(flops, moved, (exchange,))
        assert cost.collective_bytes == 24
        seconds = [
            roofline.seconds(cost, PEAK, "float32", overlap=overlap)
            for overlap in (False, True)
        ]
        assert seconds == [work + 6, max(work, 6)]


def test_seconds_of_what_is_not_known_are_nan():
    outside = roofline.Collective("all-reduce", 8, (0, 4))
    for cost, peak in (
        (roofline.Cost(math.nan, 1.0), PEAK),
        (roofline.Cost(1.0, math.nan), PEAK),
        (roofline.Cost(1.0, 1.0, (outside,)), PEAK._replace(network=math.nan)),
    ):
        for overlap in (False, True):
            seconds = roofline.seconds(cost, peak, "float32", overlap=overlap)
            assert math.isnan(seconds)


@pytest.mark.parametrize(
    ("group", "rate"),
    [
        ((0, 1, 2, 3), 4.0),  # a node
        ((4, 6), 4.0),
        ((0, 4), 1.0),  # one of each node: its own card
        ((0, 1, 4, 5), 2.0),
        (tuple(range(8)), 4.0),  # four cards, as fast as the links
    ],
)
def test_a_ring_is_as_fast_as_the_cards_where_it_leaves_a_node(group, rate):
    assert roofline.link_rate(group, PEAK) == rate


def test_a_step_at_the_roof_uses_it_fully_and_one_bound_by_memory_less():
    for dtype in ("float32", jnp.bfloat16):
        for moved, expected in ((0.0, 1.0), (1e4, 0.2 if dtype == "float32" else 0.1)):
            cost = roofline.Cost(2e4, moved)
            elapsed = roofline.seconds(cost, PEAK, dtype, overlap=True)
            used = cost.flops / (elapsed * device_peaks.flop_rate(PEAK, dtype))
            assert used == pytest.approx(expected)


def test_what_matrices_are_not_multiplied_in_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int8'"):
        device_peaks.flop_rate(PEAK, "int8")


def test_peaks_are_of_known_accelerators():
    assert device_peaks.PEAKS.get("cpu") is None
    assert device_peaks.PEAKS.get(jax.devices("cpu")[0].device_kind) is None
    assert device_peaks.PEAKS.get("TPU v5 lite") == device_peaks.PEAKS.get("TPU v5e")
    for peak in device_peaks.PEAKS.values():
        assert peak.float32 in (peak.bfloat16, peak.bfloat16 / 2)
        assert peak.link < peak.memory < peak.float32


def test_a_product_costs_two_operations_a_term_and_its_matrices():
    m, k, n = 48, 64, 80
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((m, k), (k, n))]
    cost = roofline.cost(jax.jit(jnp.matmul).lower(*shapes).compile())
    assert cost == (2 * m * k * n, 4 * (m * k + k * n + m * n), ())


def test_the_cost_is_that_of_one_device_with_the_exchange_of_its_part():
    m, k, n = 48, 64, 80
    mesh = sharding.make_mesh(data=2, fsdp=4)
    split = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    across = NamedSharding(mesh, PartitionSpec("fsdp"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(jnp.matmul, in_shardings=(split, across), out_shardings=rows)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((m, k), (k, n))]
    cost = roofline.cost(step.lower(*shapes).compile())
    part = 4 * m * n // 2  # a sum of four parts, on devices that follow one another
    assert cost.flops == pytest.approx(2 * m * k * n / 8, rel=0.2)  # and the sum's
    assert cost.collectives == (roofline.Collective("all-reduce", part, (0, 1, 2, 3)),)


def test_the_exchanges_of_a_scan_are_counted_as_often_as_it_runs():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("i")

    def body(x, _):
        return jnp.sin(jax.lax.psum(x, "i")), None

    def run(x):
        return jax.lax.scan(body, x, length=6)[0]

    run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    shape = jax.ShapeDtypeStruct((8 * 16,), jnp.float32)
    cost = roofline.cost(jax.jit(run).lower(shape).compile())
    assert roofline.traffic(cost.collectives) == {
        "all-reduce": (6, 6 * 64, 6 * 64 * 2 * 7 / 8)
    }


@pytest.mark.parametrize("answer", [None, {}, [], [{"flops": 3.0}], {"flops": 3.0}])
def test_what_a_backend_does_not_tell_is_nan(answer):
    compiled = mock.Mock(spec=jax.stages.Compiled)
    compiled.cost_analysis.return_value = answer
    compiled.as_text.return_value = None
    cost = roofline.cost(compiled)
    assert cost.flops == 3 if answer else math.isnan(cost.flops)
    assert math.isnan(cost.bytes) and cost.collectives == ()


MODEL = UNet(
    out_channels=2,
    channels=32,
    multipliers=(1, 2),
    num_res_blocks=0,
    attention_resolutions=(4,),
    num_groups=8,
)
IMAGES = 64  # of 8 x 8
# Bytes of all that is summed beside gradients: loss, metrics, the squares of norms, a
# few numbers a leaf.
SCALARS = 4096


def compile_step(**sizes):
    """The train step on eight devices, as `train` compiles it, and its parameters."""
    schedule = schedules.make_schedule(schedules.cosine_betas(20))
    objective = diffusion.Objective(var_type="learned_range", loss="hybrid")
    tx, _ = training.make_optimizer(lr=1e-3, total_steps=100, grad_clip=1.0)
    sampler = timesteps.uniform(20)
    mesh = sharding.make_mesh(**sizes)
    train_step = training.make_train_step(
        MODEL,
        tx,
        schedule,
        objective,
        sampler,
        ema_decays=(0.9,),
        param_sharding=sharding.replicated(mesh),
    )

    def init(key):
        return training.init_state(key, MODEL, tx, sampler, (8, 8, 1), (0.9,))

    key = jax.random.key(0)
    state = jax.eval_shape(init, key)
    batch = {
        "image": jax.ShapeDtypeStruct((IMAGES, 8, 8, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((IMAGES,), jnp.int32),
    }
    step, _ = sharding.jit_step(mesh, train_step, state)
    # The network as accelerators run it: on the CPU, a doubling convolution makes four
    # kernels of size 2 of its own, and their gradients are the ones summed.
    with mock.patch("jax.lax.platform_dependent", roofline.elsewhere):
        lowered = step.lower(key, state, batch)
    quick = {"xla_backend_optimization_level": "0"}
    cost = roofline.cost(lowered.compile(compiler_options=quick))
    size = 4 * sum(math.prod(a.shape) for a in jax.tree.leaves(state.params))
    return roofline.traffic(cost.collectives), size, cost


@pytest.mark.slow
def test_data_parallel_devices_exchange_the_gradient_once_and_nothing_else():
    found, size, _ = compile_step(data=8)
    assert set(found) == {"all-reduce"}
    assert size <= found["all-reduce"].bytes <= size + SCALARS


@pytest.mark.slow
def test_split_parameters_are_gathered_once_and_gradients_reduced_once():
    found, size, cost = compile_step(data=2, fsdp=4)
    assert set(found) == {"all-gather", "all-reduce"}  # and never activations
    assert found["all-gather"].bytes <= size
    # Summed within a group of four devices, then each device's part along `data`.
    assert found["all-reduce"].bytes <= size + size / 4 + SCALARS
    # XLA:CPU has no reduce-scatter: it sums on all devices and slices, twice the bytes.
    assert cost.collective_bytes <= (1 + 2) * (size + SCALARS) * 7 / 8
