"""Bytes over the network: presigned GET and PUT, the address guard, S3, JSON APIs."""
