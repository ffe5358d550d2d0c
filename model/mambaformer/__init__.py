"""The MambaFormer network: configuration, blocks, mixers, scans, cache, scaled matrices and compiled loops."""
