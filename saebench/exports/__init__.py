"""One file per checkpoint format that SAEs can be written in, for other tools to read."""
