"""exp, expm1, log1p and tanh as accurate as the device can, the logit soft-cap made of them, and 0·log 0. Arrays only.

XLA for TPUs approximates these functions by default, with relative errors up to about 1e-4: far above what we promise.
On CPUs and GPUs the compiled code is the same either way. Test: test_elementary_functions_are_accurate_on_tpus.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

exp = functools.partial(lax.exp, accuracy=lax.AccuracyMode.HIGHEST)
expm1 = functools.partial(lax.expm1, accuracy=lax.AccuracyMode.HIGHEST)
log1p = functools.partial(lax.log1p, accuracy=lax.AccuracyMode.HIGHEST)
_tanh = jax.custom_jvp(functools.partial(lax.tanh, accuracy=lax.AccuracyMode.HIGHEST))
_tanh.defjvps(lambda tangent, _, u: tangent / _cosh(u) ** 2)  # for second derivatives with a cap


def finite(m: Array) -> Array:
    """A maximum, or the least finite number where it is −inf."""
    return jnp.maximum(m, jnp.finfo(m.dtype).min)


def product(a: Array, b: Array) -> Array:
    """a·b, and 0 where a is 0 and b infinite. No 0·inf is computed, which jax_debug_nans would report."""
    return a * jnp.where((a == 0) & jnp.isinf(b), 0, b)


def times(a: Array, b: Array) -> Array:
    """a·b for a derivative b that may be infinite: 0 where a is 0, and linear in a for autodiff too.

    An infinite b is two large finite factors, so that 0·inf never occurs.
    """
    infinite, large = jnp.isinf(b), jnp.finfo(b.dtype).max
    return a * jnp.where(infinite, large, 1) * jnp.where(infinite, jnp.sign(b) * large, b)


@jax.custom_jvp
def weighted(weight: Array, loss: Array) -> Array:
    """`product`, but with ∂/∂weight = loss everywhere: autodiff has 0 where the weight is 0 and the loss infinite."""
    return product(weight, loss)


@functools.partial(weighted.defjvp, symbolic_zeros=True)  # a weight that is not perturbed costs nothing
def _weighted_jvp(primals, tangents):
    (weight, loss), (weight_tangent, loss_tangent) = primals, tangents
    out = weighted(weight, loss)
    by_weight = 0 if isinstance(weight_tangent, SymbolicZero) else times(weight_tangent, loss)
    by_loss = 0 if isinstance(loss_tangent, SymbolicZero) else weight * loss_tangent
    return out, jnp.zeros_like(out) + by_weight + by_loss


@jax.custom_jvp
def soft_capped(z: Array, cap: Array) -> Array:
    """cap·tanh(z/cap). With u = z/cap, ∂/∂z = 1/cosh²u and ∂/∂cap = tanh u − u/cosh²u.

    JAX's own derivative of tanh, 1 − tanh², is only rounding error from |u| of about 9 on. This one is accurate there.
    """
    u = z / cap
    # `maximum` is a no-op in value. It stops LLVM from fusing cap·tanh with a later − m into an FMA: z − m must be
    # exactly 0 at the largest logit. Test: test_the_largest_capped_logit_is_the_maximum_of_capped_logits, on jax 0.10.
    capped = jnp.maximum(cap * _tanh(u), -cap)
    # tanh u is u there, to one rounding. u may have lost its digits, being subnormal, if the cap is large.
    return jnp.where(jnp.abs(u) < jnp.finfo(u.dtype).eps ** 0.5 / 4, z, capped)


@soft_capped.defjvp
def _soft_capped_jvp(primals, tangents):
    (z, cap), (z_tangent, cap_tangent) = primals, tangents
    u = jnp.clip(z / cap, -40, 40)  # keeps the derivatives of cosh finite; beyond 40 the slope is below 1e-33
    slope = jnp.where(jnp.isinf(z), 0, 1 / _cosh(u) ** 2)
    return soft_capped(z, cap), slope * z_tangent + (_tanh(u) - u * slope) * cap_tangent


def _cosh(u: Array) -> Array:
    return (exp(u) + exp(-u)) / 2
