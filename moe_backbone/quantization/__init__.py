"""W8A8 FP8 of Mixture-of-Experts checkpoints: calibrated towards rare experts, written as compressed-tensors."""
