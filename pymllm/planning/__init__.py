"""What would run, and why, before anything loads."""
