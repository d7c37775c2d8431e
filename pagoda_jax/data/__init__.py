"""Pictures: where they come from, prepared records, the stream of batches, the store of noise."""
