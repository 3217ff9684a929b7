"""`gafext bench`: gafext's operations against PyTorch's, at the shapes of the networks that gafext runs.

cases.py says what is measured and against whom, measure.py how, environment.py on what, report.py prints it.
"""
