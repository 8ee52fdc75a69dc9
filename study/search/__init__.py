"""Trials run through Ray Tune: the searcher, the workers, early stopping, progress.

Imports ``setup`` and the packages below it.
"""
