"""What `parallel_keras.verify` is made of: runs of one model, what they gave, where they part."""
