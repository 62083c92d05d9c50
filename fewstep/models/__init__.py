"""Models put together from parts, and their weights on disk."""
