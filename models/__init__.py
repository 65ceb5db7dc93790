"""Reference models and learned parts; none in this version."""
