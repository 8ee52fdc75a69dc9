"""Encoding models of story listening: BERT word vectors, with or without LoRA, to voxel responses."""

__version__ = "0.1.0"
