"""Weighting: spend the gradient on the tokens and samples that matter."""
