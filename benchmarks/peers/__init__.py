"""What ``benchmarks/model.py`` measures: our models, and other people's of the same size, behind one interface."""
