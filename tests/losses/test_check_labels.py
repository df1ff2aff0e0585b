"""`check_labels`: under checkify an error that names the row and the label; anywhere else it disturbs nothing."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import jaxce

from ..helpers import integer_loss, logits, mesh_of, on_shards

N, K = 4, 5
Z = logits(N, K)
LABELS = jnp.array([0, 4, 2, 1])
TRANSFORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda z, y: f(z, y).sum()),
    "value_and_grad of jit": lambda f: jax.value_and_grad(lambda z, y: jax.jit(f)(z, y).sum()),
    "jvp": lambda f: lambda z, y: jax.jvp(lambda z: f(z, y), (z,), (z,)),
    "vmap": jax.vmap,
    "scan": lambda f: lambda z, y: jax.lax.scan(lambda total, row: (total + f(*row), None), 0.0, (z, y))[0],
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda z, y: f(z, y).sum())),
    "cond": lambda f: lambda z, y: jax.lax.cond(z[0, 0] < 1e9, f, lambda z, y: jnp.zeros(N), z, y),
    "while_loop": lambda f: (
        lambda z, y: jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + f(z, y)), (0, jnp.zeros(N)))
    ),
    "shard_map": lambda f: jax.jit(on_shards(f, mesh_of((4,), ("rows",)), P("rows"), P("rows"))),
}


def checked_loss(z, y, **options):
    jaxce.check_labels(y, K, **options)
    return integer_loss(z, y, **options)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_check_disturbs_no_transform(transform):
    transformed = transform(checked_loss)
    results = transformed(Z, LABELS)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(results))
    if transform in [TRANSFORMS[name] for name in ("plain", "grad", "jvp")]:  # labels are concrete
        with pytest.raises(ValueError, match=r"^check_labels: labels has 5 in row 1 .*, wanted 0 to 4"):
            transformed(Z, LABELS.at[1].set(K))
    else:
        again = transformed(Z, LABELS.at[1].set(K))
        assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(again))


@pytest.mark.parametrize("as_given", [jnp.asarray, np.asarray, list])
def test_concrete_labels_raise(as_given):
    labels: Any = as_given([2, 7, 0])
    with pytest.raises(ValueError, match=r"^check_labels: labels has 7 in row 1 .*, wanted 0 to 4$"):
        jaxce.check_labels(labels, np.int64(5))
    jaxce.check_labels(labels, 2**70)
    jaxce.check_labels(labels, 5, ignore_index=7)
    jaxce.check_labels(labels, 5, np.array([True, False, True]))
    with pytest.raises(ValueError, match="labels has -1 in row 0"):
        jaxce.check_labels(-1, 5)


@pytest.mark.parametrize(
    "name", ["plain", "jit", "grad", "value_and_grad of jit", "jvp", "scan", "vmap", "checkpoint", "cond"]
)
def test_checkify_names_row_and_label(name):
    checked = jax.jit(checkify.checkify(TRANSFORMS[name](checked_loss)))
    error, _ = checked(Z, LABELS)
    assert error.get() is None
    error, _ = checked(Z, LABELS.at[2].set(17))
    message = error.get()
    assert message is not None and message.startswith("check_labels: labels has 17 in row ")
    if name not in ("scan", "vmap"):  # there the function sees single rows
        assert "in row 2 " in message
    assert f"wanted 0 to {K - 1}" in message
    with pytest.raises(checkify.JaxRuntimeError, match="labels has -1 in row"):
        checked(Z, LABELS.at[1].set(-1))[0].throw()


def test_checkify_is_content_with_rows_that_do_not_take_part():
    z, labels = Z, LABELS.at[2].set(17)
    selections: list[dict[str, Any]] = [{"ignore_index": 17}, {"where": jnp.array([True, True, False, True])}]
    for options in selections:
        error, loss = checkify.checkify(lambda z, y, o=options: checked_loss(z, y, **o))(z, labels)
        assert error.get() is None and loss[2] == 0


@pytest.mark.parametrize(
    "labels, classes, keywords, error, message",
    [
        (jnp.zeros(3), 5, {}, TypeError, "labels is of dtype float32, wanted an integer dtype"),
        (LABELS, 0, {}, ValueError, "num_classes is 0, wanted at least 1"),
        (LABELS, 4.5, {}, TypeError, "num_classes is 4.5, wanted an int"),
        (LABELS, True, {}, TypeError, "num_classes is True, wanted an int"),
        (
            LABELS,
            5,
            {"where": jnp.ones(7, bool)},
            ValueError,
            f"where is of shape (7,), wanted {LABELS.shape}, as labels",
        ),
        (LABELS, 5, {"where": LABELS}, TypeError, "where is of dtype int32, wanted dtype bool"),
    ],
)
def test_errors_of_check_labels(labels, classes, keywords, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'check_labels: {message}')}$"):
        jaxce.check_labels(labels, classes, **keywords)
