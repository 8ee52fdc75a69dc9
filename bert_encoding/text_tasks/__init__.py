"""Trials on text alone: classification and domain adaptation.

Imports ``trial`` and the packages below it.
"""
