"""The commands of `i2v`."""
