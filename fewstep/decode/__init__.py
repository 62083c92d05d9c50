"""Decoding: one loop for every model and drafter, and the laws it samples from."""
