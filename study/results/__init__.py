"""What a finished or running study shows: evidence from its folder, tables, comparisons, printing.

Imports ``search`` and the packages below it.
"""
