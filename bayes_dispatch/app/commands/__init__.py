"""The ``bayes-dispatch`` command: ``main`` names the commands, each has a file of its own."""
