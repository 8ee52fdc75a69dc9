"""BERT: loading, windows, masking, LoRA and the other ways of fine-tuning it.

Imports ``core`` and ``datasets``.
"""
