"""Engines in a Ray cluster: ``cluster`` starts them, ``replica`` is one, ``routing`` chooses among them.

``bayes_dispatch.serving.replicas`` makes one engine of them, which knows nothing of Ray.
"""
