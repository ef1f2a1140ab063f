"""The Compass Mixture-of-Experts backbone. This release holds its place; the model is not in it yet."""
