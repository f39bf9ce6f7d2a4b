"""Jobs in a table of an application's own PostgreSQL. Needs the `push` extra."""
