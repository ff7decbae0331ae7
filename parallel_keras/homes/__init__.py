"""Where weights live, what joins their devices, and how tensors travel between them."""
