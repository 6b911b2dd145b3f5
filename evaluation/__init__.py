"""What a trained model is worth: held-out and downstream measures."""
