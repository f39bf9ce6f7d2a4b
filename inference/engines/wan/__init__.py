"""Wan2.2 image-to-video on one GPU."""
