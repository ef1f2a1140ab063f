"""The parts of `otpo pretrain`: its options, stages, model and documents."""
