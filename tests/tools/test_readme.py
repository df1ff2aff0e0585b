"""What the READMEs say of the tests is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_every_test_that_the_readme_names_exists():
    named = TEST.findall((TESTS / "README.md").read_text())
    assert len(named) > 50
    missing = [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in (TESTS / file).read_text()]
    assert not missing


def test_every_file_that_the_projects_readme_names_exists():
    readme = (TESTS.parent / "README.md").read_text()
    files = re.findall(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)`", readme)
    assert files and not [file for file in files if not (TESTS / file).exists()]
