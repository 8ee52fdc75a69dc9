"""Downloads of public data sets, resumed and verified.

Imports ``core`` and the readers of ``datasets``.
"""
