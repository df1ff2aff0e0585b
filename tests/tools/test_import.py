"""`import jaxce` is as light as its dependencies: beside jax it loads its own modules, and nothing else."""

import subprocess
import sys

LIST_NEW_PACKAGES = """
import sys
import jax
before = set(sys.modules)
import jaxce
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_importing_brings_neither_optax_nor_any_extra():
    result = subprocess.run([sys.executable, "-c", LIST_NEW_PACKAGES], capture_output=True, text=True, check=True)
    packages = set(result.stdout.split())
    assert "jaxce" in packages and packages <= {"jaxce", "jax", "jaxlib"}
