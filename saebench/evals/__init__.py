"""Evals: what is measured of an SAE. One file each; the formula is the module's docstring."""
