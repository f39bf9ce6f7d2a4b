"""What turns a photo into a video: one module an engine."""
