"""What `parallel_keras.explain` is made of: pieces of a step, their times, what they mean."""
