"""START READING HERE: teacher, invert, encode, guide, distill, grow, a make_train_step each; what they are given."""
