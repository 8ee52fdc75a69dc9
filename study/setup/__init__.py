"""What a study will do: options, search space, sampler, data and base settings.

Imports ``cluster`` and ``bert_encoding``.
"""
