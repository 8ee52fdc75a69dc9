"""One run of a study from start to end: plan, baselines, search, confirm phase.

Imports ``results`` and the packages below it.
"""
