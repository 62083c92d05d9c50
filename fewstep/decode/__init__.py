"""Decoding: one loop for every model and drafter, the laws it samples from, and the proof that drafting changes nothing."""
