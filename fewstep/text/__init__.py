"""Tokenizers, chat templates and stop strings: everything between text and token ids."""
