"""Values of voxels as volumes and pictures.

Imports ``trial`` and the packages below it.
"""
