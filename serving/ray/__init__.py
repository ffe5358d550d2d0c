"""Work in a Ray cluster, to which ``connection`` connects.

Engines: ``cluster`` starts them, ``replica`` is one, ``routing`` chooses among them, and
``bayes_dispatch.serving.replicas`` makes one engine of them, which knows nothing of Ray. Documents and prompts:
``bulk`` has blocks of them worked on.
"""
