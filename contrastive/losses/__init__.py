"""What sequence encoders are trained by: the next item, and contrast between two views of a history."""
