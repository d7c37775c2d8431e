"""Numbers for sets of generated images, in float64 NumPy from features and probabilities."""
