"""One TOML file for each target; ``depthwire.runtime.target`` reads and checks them."""
