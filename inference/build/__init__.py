"""Builds the parts from settings. Entry points do this once, at their start; nothing below them reads settings."""
