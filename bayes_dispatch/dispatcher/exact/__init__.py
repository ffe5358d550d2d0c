"""The posterior of a prompt's weights under the fitted program, summed over which experts share the prompt."""
