"""How codes and codebooks are learned, on plain arrays of rows and weights."""
