"""A bank of LoRA experts on vLLM: another engine behind the same protocol, where a model outgrows this process.

``export`` writes a bank as adapters that vLLM loads. ``plugin`` runs inside vLLM's own process, and gives each request
its own weights of them. ``engine`` dispatches here and lets a vLLM server write, which ``upstream`` speaks to.
``format`` is what both sides know. The plugin must load where there is neither Pyro nor all else of this project:
``format`` and ``plugin`` import nothing of it but each other.
"""
