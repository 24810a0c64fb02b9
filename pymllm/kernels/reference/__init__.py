"""The plain formula of every operation: it runs everything, slowly."""
