"""Runway's API, and paying it once."""
