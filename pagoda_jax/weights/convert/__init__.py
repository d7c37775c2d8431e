"""Published PyTorch weights <-> our parameters. `mapping` holds the engine, one file a format."""
