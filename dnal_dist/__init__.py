"""dnal_dist: learn the architecture of a convolutional network by gradient descent while training it."""
