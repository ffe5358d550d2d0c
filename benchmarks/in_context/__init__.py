"""What ``benchmarks/icl.py`` is made of: the tasks, and the training of models on them."""
