"""One model for many tasks of an event loop: a thread steps it, and requests join and leave between two steps."""
