"""Methods whose student looks at images and answers with classes or features."""
