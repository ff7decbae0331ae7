"""Several machines, seen from one worker of a `tf.distribute` cluster."""
