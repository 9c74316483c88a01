"""FLOPs and bytes of ops against formulas by hand, and the roofline that turns them into seconds."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.curves import Curve
from launcher.autopar.clusters.device import Device
from launcher.autopar.graphs.graph import CALLS, CUSTOM_CALLS, from_jaxpr
from launcher.autopar.graphs.work import KINDS, aval_bytes, op_flops, operand_bytes, result_bytes


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def ops_of(function, *shapes, inline=CALLS):
    return from_jaxpr(jax.make_jaxpr(function)(*shapes), inline=inline).ops


def flops_of(function, *shapes, inline=CALLS):
    return sum(op_flops(op) for op in ops_of(function, *shapes, inline=inline))


PRODUCTS = {
    "matrix times matrix": ("mk,kn->mn", (3, 5), (5, 7), 2 * 3 * 5 * 7),
    "batched": ("bmk,bkn->bmn", (2, 3, 5), (2, 5, 7), 2 * 2 * 3 * 5 * 7),
    "attention scores": ("bsnd,btnd->bnst", (2, 6, 3, 8), (2, 4, 3, 8), 2 * 2 * 3 * 6 * 4 * 8),
    "two contracted dims": ("abc,abd->cd", (2, 3, 5), (2, 3, 7), 2 * 2 * 3 * 5 * 7),
    "outer product": ("m,n->mn", (3,), (7,), 2 * 3 * 7),
    "inner product": ("k,k->", (5,), (5,), 2 * 5),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_matrix_product_multiplies_and_adds(name):
    letters, left, right, expected = PRODUCTS[name]

    def product(x, y):
        return jnp.einsum(letters, x, y)

    assert flops_of(product, shape(*left), shape(*right)) == expected
    # The gradients are two products of the same size.
    both = jax.value_and_grad(lambda x, y: product(x, y).sum(), (0, 1))
    assert flops_of(both, shape(*left), shape(*right)) == 3 * expected


def convolution(x, w, *, stride=1, groups=1, padding="SAME"):
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def ragged(x, w):
    return lax.ragged_dot(x, w, jnp.array([3, 1, 4]))


def test_a_ragged_product_costs_what_the_dense_one_costs():
    """8 rows of 5, each times the 5 x 7 matrix of its group; its gradients are two such products."""
    shapes = shape(8, 5), shape(3, 5, 7)
    assert flops_of(ragged, *shapes) == 2 * 8 * 5 * 7
    both = jax.value_and_grad(lambda x, w: ragged(x, w).sum(), (0, 1))
    assert flops_of(both, *shapes) == 3 * 2 * 8 * 5 * 7


@pytest.mark.parametrize("layout", ["BTNH", "BNTH"])
def test_fused_attention_costs_its_products(layout, monkeypatch):
    """Two products forward; backward the scores again and four more."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    sizes = {"B": 2, "T": 6, "S": 4, "N": 3, "H": 8}
    q = shape(*(sizes[letter] for letter in layout), dtype=jnp.bfloat16)
    k = shape(*(sizes[letter] for letter in layout.replace("T", "S")), dtype=jnp.bfloat16)

    def attention(q, k, v):
        return cudnn.dot_product_attention(q, k, v, qkv_layout=layout).astype(jnp.float32).sum()

    product = 2 * 2 * 3 * 6 * 4 * 8
    both = jax.grad(attention, (0, 1, 2))
    assert flops_of(attention, q, k, k, inline=CALLS | CUSTOM_CALLS) == 2 * product
    assert flops_of(both, q, k, k, inline=CALLS | CUSTOM_CALLS) == 7 * product


N, SIZE, IN, OUT, K = 2, 12, 8, 16, 3
CONVOLUTIONS = {
    "plain": ({}, N * SIZE * SIZE),
    "strided": ({"stride": 2}, N * (SIZE // 2) ** 2),
    "without padding": ({"padding": "VALID"}, N * (SIZE - K + 1) ** 2),
    "grouped": ({"groups": 4}, N * SIZE * SIZE),
    "grouped and strided": ({"groups": 2, "stride": 3}, N * (SIZE // 3) ** 2),
    "by channel": ({"groups": IN}, N * SIZE * SIZE),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_sums_over_its_window_and_the_channels_of_a_group(name):
    options, places = CONVOLUTIONS[name]
    shapes = shape(N, SIZE, SIZE, IN), shape(K, K, IN // options.get("groups", 1), OUT)
    expected = 2 * places * OUT * K * K * IN // options.get("groups", 1)
    assert flops_of(lambda x, w: convolution(x, w, **options), *shapes) == expected


@pytest.mark.parametrize("name", [name for name in CONVOLUTIONS if name != "without padding"])
@pytest.mark.parametrize("argument", [0, 1])
def test_a_gradient_of_a_convolution_costs_what_the_convolution_costs(name, argument):
    options, places = CONVOLUTIONS[name]
    shapes = shape(N, SIZE, SIZE, IN), shape(K, K, IN // options.get("groups", 1), OUT)
    expected = 2 * places * OUT * K * K * IN // options.get("groups", 1)
    both = jax.value_and_grad(lambda x, w: convolution(x, w, **options).sum(), argument)
    assert flops_of(both, *shapes) == pytest.approx(2 * expected)


def test_a_loop_costs_what_it_costs_unrolled():
    def step(carry, row):
        return jnp.tanh(carry @ carry.T @ carry) + row, carry.sum()

    def looped(x, rows):
        return lax.scan(step, x, rows)[0]

    def unrolled(x, rows):
        for row in rows:
            x, _ = step(x, row)
        return x

    shapes = shape(3, 5), shape(4, 3, 5)
    expected = 4 * (2 * 3 * 5 * 3 + 2 * 3 * 3 * 5)
    assert flops_of(looped, *shapes) == flops_of(unrolled, *shapes) == expected


def square(x):
    return x @ x


def with_custom_jvp():
    function = jax.custom_jvp(square)
    function.defjvp(lambda primals, tangents: (square(*primals), tangents[0]))
    return function


def with_custom_vjp():
    function = jax.custom_vjp(square)
    function.defvjp(lambda x: (square(x), None), lambda _, g: (g,))
    return function


def nested_loops(x):
    return lax.fori_loop(0, 3, lambda i, c: lax.fori_loop(0, 2, lambda j, d: d @ d, c), x)


WRAPPED = {
    "nested loops": (nested_loops, 6),
    "custom_jvp": (with_custom_jvp(), 1),
    "custom_vjp": (with_custom_vjp(), 1),
    "remat": (jax.checkpoint(square), 1),
    "jit in a loop": (lambda x: lax.fori_loop(0, 3, lambda i, c: jax.jit(square)(c), x), 3),
    "the dearer branch": (lambda x: lax.cond(x[0, 0] > 0, lambda c: c @ c @ c, square, x), 2),
    "a loop of unknown length, once": (lambda x: lax.while_loop(lambda c: c[0, 0] > 0, square, x), 1),
    "nothing to multiply": (jnp.tanh, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_inside_counts(name):
    function, products = WRAPPED[name]
    assert flops_of(function, shape(5, 5)) == products * 2 * 5**3


def test_bytes_by_dtype_and_for_typed_keys():
    assert aval_bytes(shape(3, 5, dtype=jnp.bfloat16)) == 30
    assert aval_bytes(shape(dtype=jnp.int32)) == 4
    assert aval_bytes(jax.eval_shape(jax.random.key, 0)) == 8
    (op,) = ops_of(lambda x: x * 2.0, shape(3, 5))
    assert (operand_bytes(op), result_bytes(op)) == (60, 60)  # literals cost nothing


DEVICE = Device(
    kind="test",
    memory_bytes=2**30,
    peak_flops_per_s={"fp32": 1e12, "bf16": 4e12},
    matmul_efficiency={"fp32": 0.5, "bf16": 0.25},
    memory_bytes_per_s=1e11,
    has_bf16=True,
    accelerator=True,
)


def seconds(function, *shapes, device=DEVICE):
    (op,) = ops_of(function, *shapes, inline=CALLS | CUSTOM_CALLS)
    return ComputeModel(device).op_s(op)


def test_the_roofline_takes_the_longer_of_computing_and_moving():
    large = seconds(jnp.matmul, shape(1000, 1000), shape(1000, 1000))
    assert large == pytest.approx(2 * 1000**3 / 0.5e12)
    thin = seconds(jnp.matmul, shape(1000, 1), shape(1, 1000))
    assert thin == pytest.approx(4 * (1000 + 1000 + 1000**2) / 1e11)


def test_other_ops_are_bound_by_memory_and_fused():
    assert seconds(jnp.tanh, shape(1000, 1000)) == pytest.approx(0.25 * 2 * 4e6 / 1e11)
    whole = seconds(lambda x: jnp.sum(x, axis=1), shape(1000, 1000))
    assert whole == pytest.approx(2 * 4000 / 1e11)


def test_what_is_made_where_it_is_read_takes_no_time():
    for function in (
        lambda x: jnp.broadcast_to(x, (7, 100, 100)), lambda x: x.reshape(10, 1000),
        lambda x: lax.squeeze(x[None], (0,)),
    ):  # fmt: skip
        ops = ops_of(function, shape(100, 100))
        assert sum(ComputeModel(DEVICE).op_s(op) for op in ops) == 0.0
    counter = ops_of(lambda: lax.iota(jnp.int32, 10**6))[0]
    assert ComputeModel(DEVICE).op_s(counter, np.array([1, 2])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [
        (jnp.float32, 1e12 * 0.5),
        (jnp.bfloat16, 4e12 * 0.25),
        (jnp.float16, 1e12 * 0.5),  # no figure: as fp32
        (jnp.float64, 1e12 * 0.5 / 2),  # wider than fp32
        (jnp.int8, 1e12 * 0.5),
    ],
)
def test_the_rate_depends_on_the_dtype(dtype, rate):
    with jax.enable_x64(True):
        found = seconds(jnp.matmul, shape(4000, 4000, dtype=dtype), shape(4000, 4000, dtype=dtype))
    assert found == pytest.approx(2 * 4000**3 / rate)


def test_a_peak_without_an_efficiency_takes_the_lowest_of_the_others():
    device = dataclasses.replace(DEVICE, matmul_efficiency={"fp32": 0.5})
    assert ComputeModel(device).flops_per_s("bfloat16") == 4e12 * 0.5


CURVED = dataclasses.replace(
    DEVICE,
    matmul_curve={"fp32": Curve(((1e6, 0.1), (1e8, 0.5), (1e10, 0.8)))},
    memory_bytes_per_s=1e15,
)


def product(size):
    return ops_of(jnp.matmul, shape(size, size), shape(size, size))[0]


def test_small_products_reach_less_of_the_peak():
    large, small = product(4000), product(100)
    assert ComputeModel(CURVED).op_s(large) == pytest.approx(2 * 4000**3 / (0.8 * 1e12))
    share = 0.1 + 0.4 * math.log(2) / math.log(100)
    assert ComputeModel(CURVED).op_s(small) == pytest.approx(2 * 100**3 / (share * 1e12))
    assert ComputeModel(CURVED).op_s(product(10)) == pytest.approx(1e6 / (0.1 * 1e12))


def test_what_counts_is_the_part_of_a_product_on_one_device():
    model, op = ComputeModel(CURVED), product(4000)
    assert model.op_s(op, 1280) == pytest.approx(1e8 / (0.5 * 1e12))
    shards = np.array([1, 2, 1280, 10**9])
    assert model.op_s(op, shards) == pytest.approx([model.op_s(op, n) for n in shards])
    assert model.op_s(op, 10**9) == pytest.approx(1e6 / (0.1 * 1e12))


def test_a_dtype_without_a_curve_is_as_without_curves():
    op = ops_of(jnp.matmul, shape(9, 9, dtype=jnp.bfloat16), shape(9, 9, dtype=jnp.bfloat16))[0]
    assert ComputeModel(CURVED).op_s(op, 3) == pytest.approx(2 * 9**3 / 3 / 1e12)


def test_convolutions_have_a_curve_of_their_own():
    op = ops_of(convolution, shape(N, SIZE, SIZE, IN), shape(K, K, IN, OUT))[0]
    as_product = ComputeModel(CURVED).op_s(op)
    assert as_product == pytest.approx(1e6 / (0.1 * 1e12))
    own = dataclasses.replace(CURVED, convolution_curve={"fp32": Curve(((1.0, 0.25),))})
    assert ComputeModel(own).op_s(op) == pytest.approx(op_flops(op) / (0.25 * 1e12))


def test_every_kernel_has_its_overhead_and_a_fused_op_its_share():
    slow = dataclasses.replace(DEVICE, op_overhead_s=1e-3)
    tanh = ops_of(jnp.tanh, shape(100, 100))[0]
    for op, share in ((product(100), 1.0), (tanh, 0.25)):
        for shards in (1, 4):
            more_s = ComputeModel(slow).op_s(op, shards) - ComputeModel(DEVICE).op_s(op, shards)
            assert more_s == pytest.approx(share * 1e-3)


def test_devices_that_share_cores_slow_one_another_down():
    crowded = dataclasses.replace(DEVICE, concurrency=((1.0, 1.0), (2.0, 1.5), (4.0, 3.0)))
    alone_s = ComputeModel(DEVICE).op_s(product(100))
    for at_once, factor in ((1, 1.0), (2, 1.5), (3, 2.25), (4, 3.0), (9, 3.0), (None, 3.0)):
        found_s = ComputeModel(crowded, at_once).op_s(product(100))
        assert found_s == pytest.approx(factor * alone_s)
    assert ComputeModel(crowded, 1).key == ComputeModel(DEVICE).key != ComputeModel(crowded).key


def test_models_with_equal_figures_have_equal_keys():
    faster = dataclasses.replace(DEVICE, memory_bytes_per_s=2e11)
    again = dataclasses.replace(DEVICE, kind="another name")
    assert ComputeModel(DEVICE).key == ComputeModel(again).key
    assert ComputeModel(DEVICE).key != ComputeModel(faster).key
    assert (
        ComputeModel(CURVED).key != ComputeModel(dataclasses.replace(CURVED, matmul_curve={})).key
    )
    assert hash(ComputeModel(DEVICE).key) == hash(ComputeModel(again).key)


CPU = Device(
    kind="CPU", memory_bytes=2**30, peak_flops_per_s={"fp32": 1e9}, matmul_efficiency={"fp32": 0.5},
    memory_bytes_per_s=1e30, has_bf16=False, accelerator=False,
)  # fmt: skip


def seconds_of(device, function, *shapes):
    return [float(ComputeModel(device).op_s(op)) for op in ops_of(function, *shapes)]


def test_elements_of_other_ops_cost_by_kind():
    """A reduction by what it reads, the others by what they make; views are free."""
    device = dataclasses.replace(
        CPU, element_s={kind: 10.0**-i for i, kind in enumerate(KINDS, start=6)}
    )
    whole = shape(4, 5)
    for function, element_s in (
        (lambda x: x + x, 1e-6), (lambda x: x / x, 1e-7), (jnp.exp, 1e-8),
        (lambda x: lax.reduce_max(x, (1,)), 1e-9), (lambda x: x.T, 1e-10),
        (lambda x: x.reshape(20), 0.0),
    ):  # fmt: skip
        assert seconds_of(device, function, whole) == pytest.approx([20 * element_s])


def test_a_batch_of_products_costs_so_many_small_ones():
    small, large = 2 * 4**3, 2 * 100 * 4**3
    device = dataclasses.replace(
        CPU,
        matmul_curve={"fp32": Curve(((large, 1.0),))},
        batched_matmul_curve={"fp32": Curve(((small, 0.25),))},
    )
    both = shape(100, 4, 4), shape(100, 4, 4)
    assert seconds_of(device, jnp.matmul, *both) == pytest.approx([large / 0.25 / 1e9])
    [op] = ops_of(jnp.matmul, *both)
    assert float(ComputeModel(device).op_s(op, 4)) == pytest.approx(large / 0.25 / 1e9 / 4)


def test_the_gradient_of_a_kernel_has_a_curve_of_its_own():
    def convolve(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def gradients(image, kernel):
        return jax.vjp(convolve, image, kernel)[1](image)

    device = dataclasses.replace(
        CPU,
        convolution_curve={"fp32": Curve(((1.0, 1.0),))},
        kernel_gradient_curve={"fp32": Curve(((1.0, 0.1),))},
    )
    [forward_s] = seconds_of(device, convolve, shape(2, 8, 8, 4), shape(3, 3, 4, 4))
    all_s = seconds_of(device, gradients, shape(2, 8, 8, 4), shape(3, 3, 4, 4))
    convolved = [seconds / forward_s for seconds in all_s if seconds > forward_s / 2]
    assert sorted(convolved) == pytest.approx([1.0, 1.0, 10.0])  # forward, and both gradients
