"""paredown: from a trained PyTorch model to a small, proven, measured file on an edge runtime."""
