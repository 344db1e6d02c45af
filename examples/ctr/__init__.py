"""A small CTR harness: click data, DeepFM and DNN in plain PyTorch, training and evaluation."""
