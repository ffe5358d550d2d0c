"""The guide: from a prompt's evidence to a mixture of Dirichlets, and importance sampling that corrects it."""
