"""Images: read, ordered, batched, augmented and normalised."""
