"""Compiled for accelerators ahead of time, on a machine that has none (`pip install ".[aot]"`)."""
