"""Matrices whose singular values can be scaled, and their decompositions."""
