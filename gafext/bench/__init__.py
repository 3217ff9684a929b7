"""`gafext bench`: benchmarks of gafext's operations against PyTorch's, at the shapes of the networks that gafext runs.

cases/ defines the shapes and contestants, measure.py times them, cuda.py does so on GPUs, environment.py describes the
machine, report.py prints and writes the results.
"""

SUITES = ("operations", "lengths", "samplers")
"""Sets of cases; the operations are the default."""
