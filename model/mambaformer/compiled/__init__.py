"""Loops compiled for the CPU with numba, and the one switch that decides when they run."""
