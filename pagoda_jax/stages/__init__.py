"""START READING HERE: teacher, invert, distill, grow, one make_train_step each, and what they are given."""
