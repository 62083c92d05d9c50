"""Networks and their parts: positions, mixers, blocks, heads, and the slot table of their caches."""
