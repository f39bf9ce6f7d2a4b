"""The ledger that keeps each task from being paid for twice, and the stores for its records."""
