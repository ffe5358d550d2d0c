"""A MambaFormer from sequence to sequence: a bidirectional encoder and a decoder that attends to it."""
