"""Progress over WebSocket and server-sent events."""
