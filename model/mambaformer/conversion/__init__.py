"""Checkpoints of the transformers library as models of ours: what their configurations say, where their tensors go.

``configs`` and ``layout`` tell that, ``files`` opens what is on disk, ``checkpoint`` joins them. That library is not
imported, and nothing is unpickled or executed.
"""
