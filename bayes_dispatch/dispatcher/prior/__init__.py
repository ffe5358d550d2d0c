"""The serving prior: the experts' shares, learnt from labels and rewards without refitting."""
