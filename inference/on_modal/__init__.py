"""What Modal asks for, and nothing else."""
