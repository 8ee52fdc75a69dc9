"""Search spaces: one question per file."""
