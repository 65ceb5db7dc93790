"""Reference models: an AttnRes decoder, and the maps that load checkpoints of other code bases into it."""
