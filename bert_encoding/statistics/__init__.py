"""Correlations, noise ceilings, permutation tests and intervals on arrays.

Imports ``core`` and ``datasets``.
"""
