"""Making bundles: trained from nothing, built from examples or documents, and one more expert for one that is there."""
