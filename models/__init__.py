"""Reference models: an AttnRes decoder, decoders that route their tokens, and what loads checkpoints into them."""
