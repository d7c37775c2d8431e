"""START READING HERE: teacher, invert, guide, distill, grow, one make_train_step each, and what they are given."""
