"""What runs in a process of its own, under limits; it imports neither pymllm nor torch (program.py starts it)."""
