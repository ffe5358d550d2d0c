"""What joins the parts for a person: bundles, their training, demonstration and diagnosis, and the shell commands."""
