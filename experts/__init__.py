"""The experts: SVF vectors, the bank of them on disk, the domains they are trained on, and their training."""
