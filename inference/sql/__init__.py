"""SQL databases: how statements are written and run."""
