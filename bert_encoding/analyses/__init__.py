"""Analyses beyond a trial: alignment, data check, variance partitioning, predictions for new stories.

Imports ``text_tasks`` and the packages below it.
"""
