"""Bytes over the network: presigned GET and PUT, which addresses may be visited, S3, JSON APIs."""
