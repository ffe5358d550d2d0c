"""Checkpoints of the transformers library as models of ours, and the other way round.

``configs`` tells what their configurations say, of ``parts`` and ``blocks``, which read ``keys``. ``layout`` tells
where their tensors are. Both serve both directions. ``files`` opens and makes what is on disk; ``checkpoint`` joins
them. That library is not imported, and nothing is unpickled or executed.
"""
