"""Fitting: the globals by SVI, then the noise temper by prompts of known weights."""
