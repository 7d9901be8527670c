"""The device half of augmentation: modules from one batch to the next."""
