"""Where batches come from: images, labels, prompts, or nothing at all."""
