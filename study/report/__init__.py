"""The report of a study: figures, tables and text on one HTML page.

Imports ``session`` and the packages below it.
"""
