"""Conversations: caches stay over the turns, and the weights follow what the user says."""
