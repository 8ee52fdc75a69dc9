"""The figures, one kind a file."""
