"""The endpoints: each module adds its routes to the application."""
