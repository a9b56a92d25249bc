"""A card that is not here: images from the CPU, times and energy from a model of the card."""
