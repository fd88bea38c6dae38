"""What a network says of itself: arrays computed under jit that estimators and the evaluation layer read."""
