"""One payment a task, and where records of it are kept."""
