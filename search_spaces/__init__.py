"""Search spaces: one question a file."""
