"""The command line: each command reads words, calls the function of the same name, and prints its answer."""
