"""Checkpoint formats: path -> (SAE, Site). One file each."""
