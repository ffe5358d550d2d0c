"""What ``benchmarks/adapt_from.py`` measures, and the tables that it prints."""
