"""The most that value_and_grad of a head or of a loss of logits may take: time, kernels, memory and passes.

Time is that of the roofline, in units of three bare matmuls at peak. Passes are bytes moved, in units of the logits'.
"""

import functools
from typing import NamedTuple

import jax
import pytest

from .measure import Measured, measure
from .problems import ALL_HEADS, HEADS, LOGITS_DTYPES, Case, blocks_of, cases, gradients, head, top_k, top_k_of_a_head

pytestmark = pytest.mark.aot
slow = pytest.mark.slow
targets = pytest.mark.parametrize("target", ["H100", "TPU v5e"])
MIB = 2**20


@functools.cache
def found(problem: str, contender: str, target: str) -> Measured:
    case = case_of(problem)[contender]
    with jax.numpy_dtype_promotion("standard"):  # not the strict one of our tests: peers promote
        return measure(case.function, case.arguments, target)


@functools.cache
def case_of(problem: str) -> dict[str, Case]:
    return {case.contender: case for case in cases(problem)}


# --- One head, exactly -------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    time: float
    kernels: int
    temp_mib: float


FIRST = "llama-3.1-8b"  # [8192, 4096] @ [4096, 128256]
BOUNDS = {
    ("jaxce", "H100"): Bound(1.55, 1200, 192),
    ("jaxce", "TPU v5e"): Bound(1.36, 2500, 140),
    ("jaxce, per row", "H100"): Bound(1.55, 1300, 192),
    ("jaxce, per row", "TPU v5e"): Bound(1.36, 2600, 140),
    ("jaxce, recompute=False", "H100"): Bound(1.25, 120, 2400),
    ("jaxce, recompute=False", "TPU v5e"): Bound(1.10, 200, 3100),
    ("jaxce, statistics", "H100"): Bound(1.6, 1200, 192),
    ("jaxce, statistics", "TPU v5e"): Bound(1.4, 2600, 264),
    ("jaxce, float32 w", "H100"): Bound(1.25, 120, 1900),
    ("jaxce, float32 w", "TPU v5e"): Bound(1.10, 200, 1514),
    ("jaxce, float32 w, recompute=True", "H100"): Bound(1.62, 1200, 192),
    ("jaxce, float32 w, recompute=True", "TPU v5e"): Bound(1.37, 2500, 140),
}
QUICK_PLANS = "jaxce", "jaxce, recompute=False", "jaxce, float32 w"
PLANS = [pytest.param(*names, marks=() if names[0] in QUICK_PLANS else slow) for names in BOUNDS]


@pytest.mark.parametrize(("contender", "target"), PLANS)
def test_a_language_model_s_head_takes_little_more_than_its_matmuls(contender, target):
    measured, bound = found(FIRST, contender, target), BOUNDS[contender, target]
    took = Bound(measured.time, measured.kernels, measured.temp_mib)
    assert all(a <= b for a, b in zip(took, bound, strict=True)), took


TOP_K_TIMES = {("H100", 1024): 2.6, ("H100", 4096): 1.75, ("TPU v5e", 1024): 1.55, ("TPU v5e", 4096): 1.5}


@pytest.mark.parametrize(
    "target, features", [pytest.param(*case, marks=() if case == ("TPU v5e", 1024) else slow) for case in TOP_K_TIMES]
)
def test_top_k_labels_of_a_head_take_little_more(target, features):
    x, w, _ = head(features, HEADS[FIRST][1])
    took = measure(gradients(top_k_of_a_head), (x, w, *top_k()), target)
    assert took.time <= TOP_K_TIMES[target, features], took.time
    assert took.temp_mib <= (192 if target == "H100" else 290), took.temp_mib


# --- Logits ------------------------------------------------------------------------------------------------------

QUICK_LOSSES = {("logits", "jaxce"), ("logits", "jaxce, every option")}
LIMITS = {  # passes: read, read, write; of dense targets, read both twice, and write. And MiB, on an H100 and a v5e
    "jaxce": (3.05, 9, 1),
    "jaxce, every option": (3.05, 25, 1),
    "jaxce, dense targets": (5.05, 25, 1),
    "jaxce, statistics": (3.05, 17, 1),
    "jaxce, top-k labels": (3.4, 140, 11),  # on an H100 a bit for each logit is written twice
}
LOSSES = [
    pytest.param(problem, name, target, marks=() if (problem, name) in QUICK_LOSSES or fast else slow)
    for problem in LOGITS_DTYPES
    for name in LIMITS
    for target, fast in (("H100", problem == "logits" and name != "jaxce, top-k labels"), ("TPU v5e", False))
]


@pytest.mark.parametrize(("problem", "contender", "target"), LOSSES)
def test_a_loss_of_logits_reads_them_twice_and_writes_its_gradient(problem, contender, target):
    took, (passes, on_gpu, on_tpu) = found(problem, contender, target), LIMITS[contender]
    assert took.passes <= passes, took.passes
    assert took.temp_mib <= (on_gpu if target == "H100" else on_tpu), took.temp_mib


# --- Beside peers, and beside other blocks -----------------------------------------------------------------------

SIZES = (512, 1024, 2048, 4096, 8192, 16384)  # of blocks
SHAPES = ["gemma-3-4b", "few tokens", "many tokens", "gpt-2"]
shapes = pytest.mark.parametrize("problem", SHAPES)


@slow
@shapes
@targets
def test_no_peer_is_both_faster_and_leaner_than_the_default(problem, target):
    default = found(problem, "jaxce", target)
    for name in case_of(problem):
        if not name.startswith("jaxce"):
            peer = found(problem, name, target)
            assert peer.time > default.time or peer.temp_mib > default.temp_mib, name


@slow
@shapes
@targets
def test_no_other_block_size_is_much_faster_for_as_little_memory(problem, target):
    default = found(problem, "jaxce", target)
    allowed = 1.05 * default.temp_mib
    tokens, features, classes = ALL_HEADS[problem]
    plans = dict(blocks_of(classes=SIZES))
    if 4 * features * classes / MIB <= allowed:  # blocks of rows accumulate dw in float32
        plans |= blocks_of(rows=[size for size in SIZES if size <= tokens])
    for name, (loss, dtype) in plans.items():
        plan = measure(gradients(loss), head(features, classes, dtype, tokens), target)
        assert plan.temp_mib > allowed or default.time <= 1.15 * plan.time, (name, plan.time, plan.temp_mib)
