"""The MambaFormer: configuration, scans, mixers, cache, adaptation, sampling, tokenizer and pre-training."""
