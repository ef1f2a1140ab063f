"""What `otpo export` and `otpo import` share: where a model is, its tensors, options and lines."""
