"""What the READMEs say of the tests is there."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxce

TESTS = Path(__file__).parents[1]
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_every_test_that_the_readme_names_exists():
    named = TEST.findall((TESTS / "README.md").read_text())
    assert len(named) > 50
    missing = [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in (TESTS / file).read_text()]
    assert not missing


def test_every_file_that_the_projects_readme_links_exists():
    links = re.findall(r"\]\(([^)#]+)\)", (TESTS.parent / "README.md").read_text())
    assert len(links) > 8 and not [link for link in links if not (TESTS.parent / link).exists()]


def test_every_snippet_of_the_projects_readme_runs():
    """Those after `>>>` are doctests. Of a diff, both sides run, and have one loss."""
    readme = (TESTS.parent / "README.md").read_text()
    snippets = [block for block in re.findall(r"```(\w+)\n(.*?)```", readme, re.S) if block[0] in ("python", "diff")]
    assert len(snippets) > 4
    for language, text in snippets:
        if language == "diff":
            before, after = (re.sub(rf"^{other}.*\n", "", text, flags=re.M) for other in ("[+]", "[-]"))
            losses = [run(re.sub("^[ +-]", "", side, flags=re.M))["loss"] for side in (before, after)]
            assert jnp.allclose(*losses, rtol=1e-6)
        elif ">>>" not in text:
            assert jnp.isfinite(run(text)["loss"]).all()


def run(code: str) -> dict[str, Any]:
    """What is defined after `code`, which sees a small head, its rows, and this package."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, w = jax.random.normal(keys[0], (6, 4)), jax.random.normal(keys[1], (4, 9))
    rows: dict[str, Any] = dict(x=x, w=w, embeddings=w.T, labels=jnp.arange(6), logits=x @ w)
    rows |= dict(tokens=60, mask=jnp.arange(6) < 4, teacher_logits=x @ w)
    ids, targets = jnp.argsort(x @ w)[:, -3:], jax.nn.softmax(jax.random.normal(keys[2], (6, 3)))
    teacher = dict(class_ids=ids, targets=targets)
    policy = dict(actions=jnp.arange(6), old_log_prob=-2 * jnp.ones(6), advantages=jax.random.normal(keys[3], (6,)))
    public = {name: getattr(jaxce, name) for name in jaxce.__all__}
    names = {"jax": jax, "jnp": jnp, **public, **rows, **teacher, **policy}
    exec(code, names)
    return names
