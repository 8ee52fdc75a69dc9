"""The figures of the report, one kind per file: they draw what ``results`` computed.

Imports ``results``.
"""
