"""`python -m jaxce` passes here, and fails when the loss is wrong."""

import json

import jax
import pytest

import jaxce
from jaxce import __main__ as command


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(command, "TIMED_SHAPE", (8, 128))
    monkeypatch.setattr(command, "TIMED_FEATURES", 4)


@pytest.fixture
def float32_only(monkeypatch):
    monkeypatch.setattr(command, "GRADIENT_TOLERANCE", {"float32": command.GRADIENT_TOLERANCE["float32"]})


def test_verifies_this_install_and_prints_tables(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "all checks passed" in printed
    assert "confident, against float64" in printed


def test_json_has_errors_times_and_memory(float32_only, capsys):
    assert command.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["jax"] == jax.__version__
    assert all(row["ok"] for row in report["accuracy"])
    assert {row["function"] for row in report["cost"]} >= {"jaxce", "jaxce, linear"}
    assert all(row["milliseconds"] > 0 for row in report["cost"])


@pytest.mark.parametrize("name", ["softmax_cross_entropy_with_integer_labels", "linear_cross_entropy"])
@pytest.mark.parametrize("wrong", [lambda loss: -loss, lambda loss: 0 * loss, lambda loss: loss * (1 + 1e-5)])
def test_fails_on_a_wrong_loss(float32_only, monkeypatch, name, wrong):
    right = getattr(jaxce, name)
    monkeypatch.setattr(jaxce, name, lambda *args, **options: wrong(right(*args, **options)))
    device = jax.local_devices()[0]
    table = command.linear_table if name == "linear_cross_entropy" else command.accuracy_table
    assert not all(row["ok"] for row in table("cpu", device))


def test_exits_with_1_and_says_so_when_something_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(command, "accuracy_table", lambda *_: [command.verdict("cpu", "", "float32", (1, 1), (0, 0))])
    monkeypatch.setattr(command, "linear_table", lambda *_: [])
    assert command.main([]) == 1
    assert "WRONG" in capsys.readouterr().out
