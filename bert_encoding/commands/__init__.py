"""The commands of ``python -m bert_encoding``, one per file.

Imports every other package; no package imports it.
"""
