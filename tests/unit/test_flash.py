import json
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tav_jax.models.attention.pallas_tpu import flash_attention

ROUNDING = 1e-5  # float32 against float64, for values around 1
BFLOAT16_STEP = 2**-7  # spacing of bfloat16 above 1; a result is rounded two or three times


@pytest.fixture(autouse=True)
def kernels_run_on_a_cpu(monkeypatch):
    """Run kernels in Pallas' interpreter. Memory that no kernel has written yet is NaN.

    `pltpu.force_tpu_interpret_mode` is closer to the chip, slower, and refused by jax.checkpoint.
    """
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def draw(key, queries=256, keys=384, width=40, dtype=jnp.float32):
    """Return query, key and value of one clip and two heads, and a gradient for both outputs."""
    shapes = [(queries, width), (keys, width), (keys, width), (queries, width), (queries,)]
    return [
        jax.random.normal(each, (1, 2, *shape)).astype(dtype if len(shape) == 2 else jnp.float32)
        for each, shape in zip(jax.random.split(key, 5), shapes, strict=True)
    ]


def attend_by_definition(query, key, value, do, dlse):
    """Return O, lse, and the gradients of sum(O do) + sum(lse dlse), written out in float64."""
    query, key, value, do, dlse = (np.asarray(x, np.float64) for x in (query, key, value, do, dlse))
    scale = query.shape[-1] ** -0.5
    scores = scale * query @ key.mT
    lse = np.logaddexp.reduce(scores, axis=-1)
    weights = np.exp(scores - lse[..., None])
    dp = do @ value.mT
    dp -= (weights * dp).sum(-1, keepdims=True)
    ds = scale * weights * (dp + dlse[..., None])
    return weights @ value, lse, ds @ key, ds.mT @ query, weights.mT @ do


@partial(jax.jit, static_argnames="block")
def attend_with_gradients(query, key, value, do, dlse, block=128):
    """Return what `attend_by_definition` returns. By default tiles have the smallest size."""
    outputs, gradients = jax.vjp(partial(flash_attention, block=block), query, key, value)
    return *outputs, *gradients((do, dlse))


def check(ours, expected, tolerance):
    for name, x, y in zip(["O", "lse", "dQ", "dK", "dV"], ours, expected, strict=True):
        x = np.asarray(x, np.float64)
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize(("width", "block"), [(40, 128), (80, 128), (160, 128), (40, None)])
def test_attention_its_lse_and_gradients_follow_their_definition(key, width, block):
    inputs = draw(key, width=width)
    check(attend_with_gradients(*inputs, block=block), attend_by_definition(*inputs), ROUNDING)


def test_bfloat16_is_rounded_only_on_the_way_into_matrix_products(key):
    inputs = draw(key, dtype=jnp.bfloat16)
    ours = attend_with_gradients(*inputs)
    assert [x.dtype for x in ours] == ["bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16"]
    expected = attend_by_definition(*inputs)
    check(ours, expected, BFLOAT16_STEP)
    np.testing.assert_allclose(ours[1], expected[1], rtol=ROUNDING)


def test_scores_beyond_the_range_of_exp_do_no_harm(key):
    # Half of the queries find all their scores around 190, half around -190; exp holds up to 88.
    query, keys, *others = draw(key)
    query, keys = query.at[..., ::2, 0].set(20).at[..., 1::2, 0].set(-20), keys.at[..., 0].add(60)
    expected = attend_by_definition(query, keys, *others)
    assert expected[1].max() > 150
    assert expected[1].min() < -150
    # Around 200 float32 is spaced by 1.5e-5, and the gradient multiplies by keys of 60.
    check(attend_with_gradients(query, keys, *others), expected, 100 * ROUNDING)


def test_groups_of_keys_merge_by_their_lse(key):
    inputs = draw(key, queries=128)
    query, keys, values, do, dlse = inputs

    def merged(query, keys, values):
        mixed, lse = zip(
            *(
                flash_attention(query, keys[:, :, group], values[:, :, group], block=128)
                for group in (slice(0, 128), slice(128, None))
            ),
            strict=True,
        )
        total = jnp.logaddexp(*lse)
        return sum(
            jnp.exp(y - total)[..., None] * x for x, y in zip(mixed, lse, strict=True)
        ), total

    outputs, gradients = jax.vjp(jax.jit(merged), query, keys, values)
    ours = *outputs, *gradients((do, dlse))
    check(ours, attend_by_definition(*inputs), ROUNDING)


def test_attention_made_again_for_the_gradient_gives_the_same(key):
    *inputs, do, dlse = draw(key, queries=128, keys=256)
    again = jax.jit(jax.checkpoint(partial(flash_attention, block=128)))
    outputs, gradients = jax.vjp(again, *inputs)
    ours = *outputs, *gradients((do, dlse))
    expected = attend_with_gradients(*inputs, do, dlse)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        pytest.param(100, 128, id="queries"),
        pytest.param(128, 77, id="keys"),
        pytest.param(60, 300, id="both"),
    ],
)
def test_lengths_need_not_fill_whole_tiles(key, queries, keys):
    inputs = draw(key, queries, keys, width=8)
    ours = attend_with_gradients(*inputs)
    for one, other in zip(ours, attend_by_definition(*inputs), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=ROUNDING)


COMPILE = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from tav_jax.models.attention.pallas_tpu import flash_attention

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

def loss(query, key, value):
    mixed, lse = flash_attention(query, key, value)
    return jnp.sum(jnp.square(mixed.astype(jnp.float32))) + jnp.sum(jnp.sin(lse))

for *shape, keys, width, dtype, precision in json.loads(sys.argv[1]):
    inputs = [
        jax.ShapeDtypeStruct((*shape[:2], length, width), dtype, sharding=sharding)
        for length in (shape[2], keys, keys)
    ]
    with jax.default_matmul_precision(precision):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*inputs)
    print(lowered.compile().memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="the compiler for TPUs comes with libtpu")
def test_a_tpu_v5e_has_room_for_the_kernels_and_never_holds_the_scores(users_environment):
    cases = [
        (1, 8, 32768, 4096, 40, "bfloat16", "default"),
        (8, 8, 4096, 4096, 40, "bfloat16", "default"),
        (8, 8, 1024, 1024, 80, "bfloat16", "highest"),
        (8, 8, 4096, 4096, 160, "bfloat16", "default"),
        (8, 8, 4096, 4096, 160, "float32", "default"),
        (8, 8, 256, 256, 160, "float32", "highest"),
    ]
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(cases)],
        cwd=Path(__file__).parents[2],
        # No TPU is asked about itself, and others may compile for one at the same time.
        env=users_environment
        | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    for case, temporary in zip(cases, compiled.stdout.split(), strict=True):
        batch, heads, queries, keys, width, *_ = case
        inputs = 4 * batch * heads * width * (queries + 2 * keys)
        assert int(temporary) <= inputs, case
