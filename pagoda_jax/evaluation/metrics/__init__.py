"""Numbers for sets of images from features and probabilities: in float64 NumPy, but for distances on devices."""
