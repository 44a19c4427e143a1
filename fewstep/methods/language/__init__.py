"""Methods whose student reads text."""
