"""Random walks over a hybrid model's memory: `base` what they walk over, the other modules one kind of step each."""
