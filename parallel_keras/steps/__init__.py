"""What Keras calls for each batch: the steps of fit, evaluate and predict, and what they need."""
