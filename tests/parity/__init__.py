"""Checkpoints of other packages, read by ours and compared with theirs; skipped where these are not installed."""
