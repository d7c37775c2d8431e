"""Published files: which there are, finding and checking them, frozen networks made of them."""
