"""What runs without PyTorch and transformers."""
