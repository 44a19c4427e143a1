"""Base-model families, one file each: how a network is built, loaded, called and saved."""
