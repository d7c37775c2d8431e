"""Text encoders: tokens to embeddings; what makes tokens of captions is in weights/text_encoders.py."""
