"""Where trials run: machines, the connection to Ray, the lock of a study, data on workers.

Imports ``wording`` and ``bert_encoding``.
"""
