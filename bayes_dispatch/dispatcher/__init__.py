"""The dispatcher: an estimator whose posterior says which experts a prompt needs, and how sure that is.

The way through: ``evidence`` (what was seen of a prompt) → ``program`` (the Pyro program of it) → ``fitting``
(its globals by SVI, and the noise temper) → ``exact`` (a prompt's weights, summed over who shares it) → ``posterior``.
``estimator`` joins them, ``prior`` learns from labels while serving, ``gate`` finds foreign prompts.
"""
