"""Tables over the CPUs of several ranks: ids go to where rows lie, vectors come back, gradients go again."""
