"""Time, memory and error of jaxce and of every installed peer: `python -m tests.benchmarks --help`."""
