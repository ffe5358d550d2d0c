"""Two-pass inference: first pass, blends, second pass, and the comparison of blends."""
