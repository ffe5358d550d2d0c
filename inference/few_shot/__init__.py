"""Few-shot adaptation: the posterior over weights given a handful of answered questions, and other strategies."""
