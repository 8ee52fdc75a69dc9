"""Cross-validated ridge regression from features to voxels.

Imports ``features`` and the packages below it.
"""
