"""The Pyro program: a prior over the weights of each prompt, and the likelihoods of its views."""
