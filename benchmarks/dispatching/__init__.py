"""What ``benchmarks/dispatch.py`` and ``benchmarks/dispatch_cost.py`` measure."""
