"""One trial: its settings, the pipeline from words to scores, its record and tables.

Imports ``demo`` and the packages below it.
"""
