"""`gafext doctor`: what a run would use on this machine, why not something faster, and what is broken.

findings.py collects everything, operations.py asks the operations, known.py and cards.py hold what was found out
before, text.py prints. Only operations.py and functions import the extension: the rest runs where it does not load.
"""
