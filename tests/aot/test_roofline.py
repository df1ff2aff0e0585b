"""The roofline of programs whose flops, bytes and trips are known by hand."""

import jax
import jax.numpy as jnp
import pytest

from .roofline import PEAKS, Roofline, roofline
from .targets import compiled

bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
aot = pytest.mark.aot
targets = pytest.mark.parametrize("target", ["H100", "TPU v5e"])


def array(*shape, dtype=f32):
    return jax.ShapeDtypeStruct(shape, dtype)


def roof(f, *arguments, target) -> Roofline:
    return roofline(compiled(f, arguments, target).as_text(), target)


def about(n):
    """What XLA adds for loop counters and the like is small."""
    return pytest.approx(n, rel=0.02)


# --- Compiled for a device ---------------------------------------------------------------------------------------


@aot
@targets
def test_matmul(target):
    m, k, n = 8192, 4096, 16384
    found = roof(lambda x, w: x @ w, array(m, k, dtype=bf16), array(k, n, dtype=bf16), target=target)
    assert found.flops == 2 * m * k * n
    assert found.bytes == 2 * (m * k + k * n + m * n)
    kernel = found.table[0]
    assert kernel.seconds == max(kernel.flops / PEAKS[target][0], kernel.bytes / PEAKS[target][1])
    assert found.seconds == pytest.approx(found.flops / PEAKS[target][0], rel=0.02)


@aot
@targets
@pytest.mark.parametrize("equation", ["bij,bjk->bik", "ibj,kbj->bik", "ibj,bjk->ik"])
def test_matmuls_of_batches(target, equation):
    sizes = dict(b=16, i=256, j=512, k=384)
    x, w = (array(*(sizes[axis] for axis in axes), dtype=bf16) for axes in equation.split("->")[0].split(","))
    found = roof(lambda x, w: jnp.einsum(equation, x, w), x, w, target=target)
    assert found.flops == 2 * 16 * 256 * 512 * 384


@aot
@targets
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_three_matmuls_of_a_head(target, dtype):
    n, d, k = 1024, 512, 8192
    x, w, dz = array(n, d, dtype=dtype), array(d, k, dtype=dtype), array(n, k, dtype=dtype)
    found = roof(lambda x, w, dz: (x @ w, dz @ w.T, x.T @ dz), x, w, dz, target=target)
    assert found.flops == 3 * 2 * n * d * k


@aot
@targets
def test_scan_of_matmuls_counts_its_trips(target):
    steps, n = 24, 4096

    def f(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    found = roof(f, array(n, n, dtype=bf16), array(steps, n, n, dtype=bf16), target=target)
    assert found.flops == steps * 2 * n**3
    assert {kernel.trips for kernel in found.table if kernel.flops} == {steps}
    assert found.kernels >= steps
    matmuls = [kernel for kernel in found.table if kernel.flops]
    array_each_step = steps * 2 * n * n
    on_chip = 2 if target == "TPU v5e" else 0  # x and the result
    assert sum(kernel.bytes for kernel in matmuls) == about((3 - on_chip) * array_each_step)


@aot
@targets
@pytest.mark.parametrize("size", [2, 5])
def test_loops_in_loops_multiply(target, size):
    def f(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, x: jax.lax.fori_loop(0, size, lambda _, x: jnp.tanh(x @ w), x), x)

    n = 1024
    assert roof(f, array(n, n), array(n, n), target=target).flops == 7 * size * 2 * n**3


@aot
@targets
@pytest.mark.parametrize(("start", "step", "trips"), [(0, 1, 100), (1, 3, 33), (99, -7, 15)])
def test_while_loops_that_count_by_any_step(target, start, step, trips):
    def f(x, w):
        more = (lambda state: state[0] < 100) if step > 0 else (lambda state: state[0] >= 0)
        return jax.lax.while_loop(more, lambda state: (state[0] + step, state[1] @ w), (jnp.int32(start), x))[1]

    n = 1024
    assert roof(f, array(n, n, dtype=bf16), array(n, n, dtype=bf16), target=target).flops == trips * 2 * n**3


@aot
@targets
def test_a_loop_that_ends_nobody_knows_when_is_an_error(target):
    def f(x, w):
        return jax.lax.while_loop(lambda s: (s[0] < 100) & (s[1][0, 0] > 0), lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]

    with pytest.raises(ValueError, match=r"the trip count of the loop while[\w.]* is not known"):
        roof(f, array(64, 64), array(64, 64), target=target)


ROWS, WIDE = 65536, 8192  # float32: 2 GiB, which no on-chip memory holds


@aot
@targets
def test_update_in_place_in_a_loop_moves_slices(target):
    def f(buffer, u):
        def body(i, buffer):
            part = jax.lax.dynamic_slice(buffer, (64 * i, 0), (64, WIDE))
            return jax.lax.dynamic_update_slice(buffer, part * 2 + u, (64 * i, 0))

        return jax.lax.fori_loop(0, 100, body, buffer)

    found = roof(f, array(ROWS, WIDE), array(64, WIDE), target=target)
    copied = 2 * 4 * ROWS * WIDE  # the argument is not donated
    update = 4 * 64 * WIDE
    assert copied + 100 * 2 * update <= found.bytes <= 1.001 * copied + 100 * 3 * update
    moved = sum(kernel.bytes for kernel in found.table if kernel.trips == 100)
    assert 100 * 2 * update <= moved <= 1.001 * 100 * 3 * update


@aot
@targets
def test_updates_of_two_buffers_at_once_move_slices(target):
    def f(a, b, u):
        def body(i, state):
            v = jnp.sin(u * i)
            return tuple(jax.lax.dynamic_update_slice(s, v + k, (64 * i, 0)) for k, s in enumerate(state))

        return jax.lax.fori_loop(0, 100, body, (a, b))

    found = roof(f, array(ROWS, WIDE), array(ROWS, WIDE), array(64, WIDE), target=target)
    moved = sum(kernel.bytes for kernel in found.table if kernel.trips == 100)
    update = 4 * 64 * WIDE
    assert 100 * 2 * update <= moved <= 1.001 * 100 * 6 * update


@aot
@targets
def test_update_of_what_is_computed_writes_all_of_it(target):
    found = roof(
        lambda x, u: jax.lax.dynamic_update_slice(x * 2, u, (64, 0)), array(ROWS, WIDE), array(64, WIDE), target=target
    )
    assert found.bytes == about(2 * 4 * ROWS * WIDE)


@aot
def test_scatter_moves_what_it_adds():
    def f(x, labels):
        def body(i, x):
            return x.at[jnp.arange(ROWS), (labels + i) % WIDE].add(1.0)

        return jax.lax.fori_loop(0, 100, body, x)

    # Not on a TPU, whose compiler makes another program of it.
    found = roof(f, array(ROWS, WIDE), array(ROWS, dtype=i32), target="H100")
    moved = sum(kernel.bytes for kernel in found.table if kernel.trips == 100)
    assert 100 * 2 * 4 * ROWS <= moved <= 100 * 10 * 4 * ROWS


@aot
@targets
def test_elementwise_chain_is_one_kernel(target):
    found = roof(lambda x: jnp.exp(jnp.sin(x) * 2 + 1), array(ROWS, WIDE), target=target)
    assert (found.kernels, found.flops, found.bytes) == (1, 0, 2 * 4 * ROWS * WIDE)
    assert found.seconds == found.bytes / PEAKS[target][1]


@aot
@targets
def test_an_operand_that_is_used_twice_is_read_once(target):
    found = roof(lambda x: jnp.sin(x) * x, array(ROWS, WIDE), target=target)
    assert found.bytes == 2 * 4 * ROWS * WIDE


@aot
@targets
def test_reduction_reads_all_and_writes_little(target):
    found = roof(lambda x: x.sum(1), array(ROWS, WIDE), target=target)
    assert found.bytes == about(4 * ROWS * WIDE)
    assert found.flops == 0


@aot
@targets
def test_reductions_that_wait_for_each_other_are_passes(target):
    rows, wide = 2048, 262144  # shorter rows a GPU would keep in its registers
    found = roof(lambda z: jnp.exp(z - z.max(1, keepdims=True)).sum(1), array(rows, wide), target=target)
    assert found.bytes == about(2 * 4 * rows * wide)


@aot
@targets
def test_gather_moves_what_it_reads(target):
    found = roof(lambda x, i: x[i], array(ROWS, WIDE), array(512, dtype=i32), target=target)
    assert found.bytes == about(2 * 4 * 512 * WIDE)


@aot
@targets
def test_labels_logits_are_gathered_not_read(target):
    found = roof(
        lambda z, y: jnp.take_along_axis(z, y[:, None], 1).sum(),
        array(ROWS, WIDE),
        array(ROWS, dtype=i32),
        target=target,
    )
    assert found.bytes <= 10 * 4 * ROWS


@aot
@targets
def test_slices_of_a_fusion_s_operand_are_what_it_reads(target):
    found = roof(lambda x: jnp.sin(x[:512]) + x[-512:].astype(bf16).astype(f32), array(ROWS, WIDE), target=target)
    assert found.bytes == 3 * 4 * 512 * WIDE


@aot
@targets
@pytest.mark.parametrize("dear_first", [True, False])
def test_conditional_counts_its_dearest_branch(target, dear_first):
    branches = (lambda x: x @ x, lambda x: x * 2)
    n = 4096
    found = roof(
        lambda p, x: jax.lax.cond(p, *(branches if dear_first else branches[::-1]), x),
        array(dtype=jnp.bool_),
        array(n, n, dtype=bf16),
        target=target,
    )
    assert found.flops == 2 * n**3
    assert found.bytes == about(2 * 2 * n * n)


# --- Read from text ----------------------------------------------------------------------------------------------

KIB = 1024  # of f32[256]


def program(entry: str, others: str = "") -> str:
    lines = "\n".join("  " + line.strip() for line in entry.strip().splitlines())
    return f"HloModule m, is_scheduled=true\n{others}\nENTRY %main (p: f32[1]) -> f32[1] {{\n{lines}\n}}\n"


def read(entry: str, others: str = "", target: str = "TPU v5e") -> Roofline:
    return roofline(program(entry, others), target)


LOOP = """
%body (s: (s32[], f32[256])) -> (s32[], f32[256]) {
  %s = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %i.copy = s32[]{:T(128)S(6)} copy(%i)
  %one = s32[] constant(1)
  %next = s32[] add(%i.copy, %one)
  %x = f32[256]{0} get-tuple-element(%s), index=1
  %y = f32[256]{0} negate(%x)
  ROOT %t = (s32[], f32[256]{0}) tuple(%next, %y)
}
%compared (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %many = s32[] constant(10)
  ROOT %less = pred[] compare(%a, %many), direction=LT
}
%condition (s: (s32[], f32[256])) -> pred[] {
  %s = (s32[], /*index=1*/f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%compared
}
"""
WHILE = """
%x = f32[256]{0} parameter(0)
%first = s32[] constant(4)
%state = (s32[], f32[256]{0}) tuple(%first, %x)
ROOT %loop = (s32[], f32[256]{0}) while(%state), condition=%condition, body=%body
"""


def test_trips_are_counted_from_the_start_to_the_constant_of_a_fused_comparison():
    kernels = {kernel.name: kernel for kernel in read(WHILE, LOOP).table}
    assert kernels["y"].trips == 6
    assert kernels["y"].bytes == 6 * 2 * KIB


def test_a_trip_count_that_xla_knows_is_taken():
    known = WHILE.rstrip() + ', backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"4","step":"1"}}'
    assert {kernel.trips for kernel in read(known, LOOP).table} == {3}


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("s32[] add(%i.copy, %one)", "s32[] multiply(%i.copy, %one)"),
        ("s32[] add(%i.copy, %one)", "s32[] add(%i.copy, %i)"),
        ("%many = s32[] constant(10)", "%many = s32[] negate(%a)"),
        ("pred[] compare(%a, %many), direction=LT", "pred[] and(%a, %many)"),
        ("%first = s32[] constant(4)", "%first = s32[] parameter(1)"),
    ],
)
def test_a_loop_that_does_not_count_by_constants_is_an_error(was, becomes):
    assert was in WHILE + LOOP
    with pytest.raises(ValueError, match="the trip count of the loop loop is not known"):
        read(WHILE.replace(was, becomes), LOOP.replace(was, becomes))


NESTED = """
%inner (b: f32[64,256], u: f32[256], i: s32[]) -> f32[64,256] {
  %b = f32[64,256]{1,0} parameter(0)
  %u = f32[256]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,256]{1,0} bitcast(%u)
  ROOT %update = f32[64,256]{1,0} dynamic-update-slice(%b, %row, %i, %zero)
}
%outer (b: f32[64,256], u: f32[256], i: s32[]) -> (f32[256], f32[64,256]) {
  %b = f32[64,256]{1,0} parameter(0)
  %u = f32[256]{0} parameter(1)
  %i = s32[] parameter(2)
  %twice = f32[256]{0} add(%u, %u)
  %updated = f32[64,256]{1,0} fusion(%b, %twice, %i), kind=kLoop, calls=%inner
  ROOT %t = (f32[256]{0}, f32[64,256]{1,0}) tuple(%twice, %updated)
}
"""
UPDATE = """
%b = f32[64,256]{1,0} parameter(0)
%u = f32[256]{0} parameter(1)
%i = s32[] parameter(2)
ROOT %f = (f32[256]{0}, f32[64,256]{1,0}) fusion(%b, %u, %i), kind=kLoop, calls=%outer
"""


def test_update_in_a_fusion_in_a_fusion_that_returns_a_tuple():
    assert read(UPDATE, NESTED).bytes == KIB + 4 + KIB + KIB  # u and i, twice, the row
    used_elsewhere = NESTED.replace("add(%u, %u)", "reduce(%b, %i), dimensions={0}, to_apply=%sum")
    assert read(UPDATE, used_elsewhere).bytes == 64 * KIB + 4 + KIB + KIB  # b is read, not written


def test_update_of_a_computed_buffer_writes_all_of_it():
    computed = NESTED.replace("fusion(%b, %twice", "fusion(%c, %twice").replace(
        "  %twice", "  %c = f32[64,256]{1,0} negate(%b)\n  %twice"
    )
    assert read(UPDATE, computed).bytes == 64 * KIB + KIB + 4 + KIB + 64 * KIB


def test_scatter_reads_and_writes_what_it_touches():
    found = read("""
        %x = f32[64,256]{1,0} parameter(0)
        %indices = s32[8,2]{1,0} parameter(1)
        %added = f32[8]{0} parameter(2)
        ROOT %y = f32[64,256]{1,0} scatter(%x, %indices, %added), to_apply=%sum
        """)
    assert found.bytes == 4 * (8 + 2 * 8 + 8) + 4 * 8


def test_on_chip_buffers_are_free():
    on_chip = UPDATE.replace("%u = f32[256]{0}", "%u = f32[256]{0:T(256)S(1)}").replace(
        "(f32[256]{0}, f32[64,256]{1,0}) f", "(f32[256]{0:S(1)}, f32[64,256]{1,0}) f"
    )
    assert read(on_chip, NESTED).bytes == 4 + KIB


def test_what_a_nested_fusion_hands_on_is_read():
    nested = """
%names (w: bf16[4096,512]) -> bf16[512,4096] {
  %w = bf16[4096,512]{1,0} parameter(0)
  ROOT %same = bf16[512,4096]{0,1} bitcast(%w)
}
%matmul (x: bf16[128,4096], w: bf16[4096,512]) -> f32[128,512] {
  %x = bf16[128,4096]{1,0} parameter(0)
  %w = bf16[4096,512]{1,0} parameter(1)
  %same = bf16[512,4096]{0,1} fusion(%w), kind=kLoop, calls=%names
  ROOT %z = f32[128,512]{1,0} convolution(%x, %same), dim_labels=bf_oi->bf
}
"""
    found = read(
        """
        %x = bf16[128,4096]{1,0} parameter(0)
        %w = bf16[4096,512]{1,0} parameter(1)
        ROOT %z = f32[128,512]{1,0} fusion(%x, %w), kind=kOutput, calls=%matmul
        """,
        nested,
    )
    assert found.bytes == 2 * 128 * 4096 + 2 * 4096 * 512 + 4 * 128 * 512
    assert found.flops == 2 * 128 * 4096 * 512


def test_windows_of_a_convolution_that_is_a_batch_of_matmuls():
    found = read(
        """
        %x = bf16[16,256,512]{2,1,0} parameter(0)
        %w = bf16[16,512,384]{2,1,0} parameter(1)
        ROOT %z = f32[16,256,384]{2,1,0} convolution(%x, %w), window={WINDOW}, dim_labels=0bf_0io->0bf
        """.replace("WINDOW", "size=16 stride=15 lhs_dilate=16")
    )
    assert found.flops == 2 * 16 * 256 * 512 * 384


def test_library_matmul_has_a_workspace_that_is_free():
    dimensions = '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
    call = 'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":%s}}'
    found = read(
        """
        %x = bf16[128,4096]{1,0} parameter(0)
        %w = bf16[4096,512]{1,0} parameter(1)
        ROOT %z = (bf16[128,512]{1,0}, s8[33554432]{0}) custom-call(%x, %w), CALL
        """.replace("CALL", call % dimensions),
        target="H100",
    )
    assert found.flops == 2 * 128 * 4096 * 512
    assert found.bytes == 2 * (128 * 4096 + 4096 * 512 + 128 * 512)


ASYNCHRONOUS = """
%sliced (b: f32[64,256], i: s32[]) -> f32[1,256] {
  %b = f32[64,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,256]{1,0} dynamic-slice(%b, %i, %i), dynamic_slice_sizes={1,256}
}
"""


def test_asynchronous_pairs_are_one_kernel():
    found = read(
        """
        %b = f32[64,256]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %copy-start = (f32[64,256]{1,0:S(1)}, f32[64,256]{1,0}, u32[]{:S(2)}) copy-start(%b), index=0
        %f = ((f32[64,256]{1,0}, s32[]), f32[1,256]{1,0}, u32[]) fusion-start(%b, %i), kind=kLoop, calls=%sliced
        %f.done = f32[1,256]{1,0} fusion-done(%f)
        %copy-done = f32[64,256]{1,0:S(1)} copy-done(%copy-start)
        ROOT %t = (f32[1,256]{1,0}, f32[64,256]{1,0:S(1)}) tuple(%f.done, %copy-done)
        """,
        ASYNCHRONOUS,
    )
    assert found.kernels == 2
    assert found.bytes == (KIB + 4 + KIB) + 64 * KIB


def test_called_computations_run():
    called = ASYNCHRONOUS.replace("%sliced", "%called")
    found = read(
        """
        %b = f32[64,256]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %c = f32[1,256]{1,0} call(%b, %i), to_apply=%called
        %a = ((f32[64,256]{1,0}, s32[]), f32[1,256]{1,0}, u32[]) async-start(%b, %i), calls=%called
        %a.done = f32[1,256]{1,0} async-done(%a)
        %d = ((f32[64,256]{1,0}, s32[]), f32[1,256]{1,0}, u32[]) call-start(%b, %i), to_apply=%called
        ROOT %d.done = f32[1,256]{1,0} call-done(%d)
        """,
        called,
    )
    assert (found.kernels, found.bytes) == (3, 3 * (KIB + 4 + KIB))


def test_what_only_names_or_allocates_buffers_is_no_kernel():
    found = read("""
        %x = f32[64,256]{1,0} parameter(0)
        %new = f32[64,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"
        %y = f32[256,64]{0,1} bitcast(%x)
        ROOT %t = (f32[64,256]{1,0}, f32[256,64]{0,1}) tuple(%new, %y)
        """)
    assert (found.kernels, found.bytes, found.seconds) == (0, 0, 0)


def test_a_pallas_kernel_is_an_error():
    with pytest.raises(ValueError, match="tpu_custom_call"):
        read('ROOT %z = f32[64,256]{1,0} custom-call(), custom_call_target="tpu_custom_call"')


def test_kernels_are_sorted_by_time_and_add_up():
    found = read(WHILE, LOOP)
    assert [kernel.seconds for kernel in found.table] == sorted((k.seconds for k in found.table), reverse=True)
    for field in ("seconds", "flops", "bytes"):
        assert getattr(found, field) == sum(getattr(kernel, field) for kernel in found.table)
    assert found.kernels == sum(kernel.trips for kernel in found.table)
