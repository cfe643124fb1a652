"""Numbers computed by the official code, and how we are compared with them."""
