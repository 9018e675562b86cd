"""Architectures, for inference only: how to encode and decode. One file each."""
