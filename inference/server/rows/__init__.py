"""The rows of the embedded queue, in SQLite or PostgreSQL."""
