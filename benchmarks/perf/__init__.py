"""Speed of decoding, with random weights."""
