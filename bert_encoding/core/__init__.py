"""Names, files, storage, seeds, devices and the command line, for every other package.

Imports no other package of the project.
"""
