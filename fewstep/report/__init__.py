"""Claims measured, techniques raced, figures drawn."""
