"""`python -m tests.benchmarks.figure`: the README's figure, `notebooks/jaxce.png`.

Left: the gradient at the label of a row that is sure of it, by margin. Right: a language model's head on an H100, time
against memory, of the programs in `notebooks/accelerators.json`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxce

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
HEAD, TARGET = "llama-3.1-8b", "H100"
SHOWN = {  # of contenders: the name in the figure, and where it stands
    "jaxce": ("jaxce", (10, 6)),
    "jaxce, recompute=False": ("jaxce, recompute=False", (-50, 10)),
    "optax": ("optax, float32 logits", (-60, 10)),
    "optax, bfloat16 logits": ("optax, bfloat16 logits", (-50, -17)),
    "tokamax chunked_xla": ("tokamax", (-58, -4)),
    "jax-cce": ("jax-cce", (8, -4)),
}


def gradients(axes) -> None:
    import optax

    margins = jnp.linspace(1.0, 60.0, 119)
    truth = 2 / (2 + np.exp(np.linspace(1.0, 60.0, 119)))  # of three classes: 1 − o_y
    axes.semilogy(margins, truth, color="0.75", linewidth=6, label="exact: 1 − o at the label")
    for name, library, style in (("jaxce", jaxce, "C0-"), ("optax", optax.losses, "kx")):
        loss = library.softmax_cross_entropy_with_integer_labels
        logits = jnp.stack([margins, 0 * margins, 0 * margins], -1)
        gradient = -jax.grad(lambda z, loss=loss: loss(z, jnp.zeros(119, int)).sum())(logits)[:, 0]
        axes.semilogy(margins, jnp.where(gradient > 0, gradient, jnp.nan), style, linewidth=2, markersize=5, label=name)
    axes.annotate("optax: 0 from here on", (17, 1e-7), (24, 3e-5), arrowprops={"arrowstyle": "->"})
    axes.set(xlabel="margin of the label's logit, in nats", ylabel="size of the gradient, float32")
    axes.set_title("A sure row still has a gradient")
    axes.legend(loc="lower left")


def head(axes) -> None:
    rows = json.loads((NOTEBOOKS / "accelerators.json").read_text())["rows"]
    rows = {r["contender"]: r for r in rows if (r["problem"], r["target"]) == (HEAD, TARGET)}
    for name, (label, place) in SHOWN.items():
        x, y = rows[name]["temp_mib"] / 1024, rows[name]["time"]
        ours = name.startswith("jaxce")
        axes.plot(x, y, "o" if ours else "s", color="C0" if ours else "0.4", markersize=9)
        axes.annotate(label, (x, y), place, textcoords="offset points")
    axes.set(xlim=(0, 7), ylim=(0.8, 3), xlabel="memory beside inputs and gradients, GiB")
    axes.set_ylabel("least time / three matmuls")
    axes.set_title("[8192, 4096] @ [4096, 128256] on an H100, as compiled", fontsize=10)


def main() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    gradients(left)
    head(right)
    figure.savefig(NOTEBOOKS / "jaxce.png", dpi=110)


if __name__ == "__main__":
    main()
