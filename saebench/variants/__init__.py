"""Trainable variants: the loss, the training-time forward and the export of each. One file each."""
