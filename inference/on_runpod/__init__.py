"""What RunPod asks for, of a worker behind an endpoint and of its callers, and nothing else."""
