"""A checkpoint cluster in the RAM of the training job's own nodes."""
