"""Measured claims, one script a table; `first_contact` is the package that `make gpu` runs."""
