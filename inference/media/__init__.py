"""Photos in, videos out."""
