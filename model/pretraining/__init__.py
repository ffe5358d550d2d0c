"""Pre-training of a causal language model, alone or over several processes, checkpointed and resumed exactly."""
