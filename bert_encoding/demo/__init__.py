"""Bundled stories and simulated listeners whose truth is known.

Imports ``regression`` and the packages below it.
"""
