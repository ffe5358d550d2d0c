"""What judges a posterior: calibration, coverage, selective risk, the NumPyro twin, and pictures of them."""
