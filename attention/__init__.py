"""Attention through block tables. Nothing here yet."""
