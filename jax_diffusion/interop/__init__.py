"""Other people's files: reading their checkpoints, writing ours for them."""
