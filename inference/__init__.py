"""serverless-i2v: one leased photo becomes one delivered video, on whatever machine there is work for."""

__version__ = "0.1.0"
