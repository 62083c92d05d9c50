"""Checkpoints of others, in and out: Hugging Face directories and hub ids, shipped models, run folders."""
