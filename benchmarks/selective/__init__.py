"""Answers of a bundle, how sure each is by several scores, and tables of what these are worth."""
