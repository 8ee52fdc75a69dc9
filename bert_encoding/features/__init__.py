"""From words to features: word vectors and their downsampling to TRs.

Imports ``language_model`` and the packages below it.
"""
