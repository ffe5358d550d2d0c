"""Fitting: the globals by SVI, then the guide on simulations from the fitted program."""
