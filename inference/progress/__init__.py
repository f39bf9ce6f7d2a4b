"""How far a task is."""
