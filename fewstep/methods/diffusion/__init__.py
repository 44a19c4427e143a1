"""Methods whose students are denoisers, one file a paper."""
