"""One lease from its first heartbeat to its report; taking leases, and handing them back."""
