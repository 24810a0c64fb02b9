"""Calls of tools as models write them: one file a family of templates, which reads calls and forces them."""
