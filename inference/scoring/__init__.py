"""Blends compared on documents: how probable each makes the text, and tables of it."""
