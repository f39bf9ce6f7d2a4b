"""Where tasks come from: one module a dialect."""
