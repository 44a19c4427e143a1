"""Methods for protein backbones."""
