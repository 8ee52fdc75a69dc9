"""The methods section of the report, in sentences ready for a paper.

Imports ``session`` and the packages below it.
"""
