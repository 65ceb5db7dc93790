"""Passes: each rewrites a captured program and says what it did, one pass a file."""
